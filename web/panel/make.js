// Elements of the page. Texts are set as texts, never as markup: names of files, runs and errors are anyone's.

// An element with attributes and children; a child that is a string becomes text, one that is null is left out.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Keys that act on what is focused in an element are no shortcuts of the graph's.
export function keepKeys(element) {
  element.addEventListener("keydown", (event) => {
    if (["Enter", " ", "Delete", "Backspace"].includes(event.key)) event.stopPropagation();
  });
}

// Opens over the page what is gone once it is closed: by its own close(), by Escape or by a press beside it.
export function openDialog(dialog) {
  // The graph's own shortcuts are not meant meanwhile.
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// Sets a text where it changed, so that nothing is laid out again for nothing.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Sets an attribute where it changed.
export function mark(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}
