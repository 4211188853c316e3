// Repair of links in help pages, which assume the registry's folder name, if the pack's folder has another name.
const NAMED = /^(?:.*\/)?extensions\/graft\//;

function rehome({ target }) {
  const link = target.closest?.('a[href*="extensions/graft/docs/"]');
  if (link) link.href = new URL(link.getAttribute("href").replace(NAMED, ""), import.meta.url).href;
}

export function followLinks(page) {
  for (const event of ["pointerdown", "click"]) page.addEventListener(event, rehome, true);
}
