// Help pages name the pack's folder as the registry calls it; where it is called otherwise their links are put right.
const NAMED = /^(?:.*\/)?extensions\/graft\//;

function rehome({ target }) {
  const link = target.closest?.('a[href*="extensions/graft/docs/"]');
  if (link) link.href = new URL(link.getAttribute("href").replace(NAMED, ""), import.meta.url).href;
}

export function followLinks(page) {
  for (const event of ["pointerdown", "click"]) page.addEventListener(event, rehome, true);
}
