// Page elements, and updates of them. Text is set as text, never as markup: file names, run names and errors are untrusted.

// Return an element with attributes and children; string children become text, null children are dropped.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Keep keys that act on a focused element from the graph's shortcuts.
export function keepKeys(element) {
  element.addEventListener("keydown", (event) => {
    if (["Enter", " ", "Delete", "Backspace"].includes(event.key)) event.stopPropagation();
  });
}

export function button(label, act) {
  const element = make("button", { type: "button" }, label);
  element.addEventListener("click", act);
  return element;
}

// Add an element to a node, as a widget that has a least height and no value.
export function addElement(node, name, kind, element, height) {
  const widget = node.addDOMWidget(name, kind, element, {
    serialize: false, // omitted from the prompt
    hideOnZoom: false,
    getMinHeight: () => height,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // and from the workflow
}

// Open a modal dialog that is removed once closed: by its own close(), by Escape, or by a press beside it unless it holds
// work that a careless press must not end.
export function openDialog(dialog, holdsWork = false) {
  // Keep all keys from the graph's shortcuts meanwhile.
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && !holdsWork) dialog.close();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// Set a text if it changed, to avoid needless layout.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function mark(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// Return a function that runs `work` soon, at most once per `pause` milliseconds and only while the page is visible.
export function throttled(work, pause) {
  let waiting = false;
  let last = -Infinity;
  const run = () =>
    requestAnimationFrame(() => {
      waiting = false;
      last = performance.now();
      work();
    });
  return () => {
    if (waiting) return;
    waiting = true;
    const rest = pause - (performance.now() - last);
    if (rest > 0) setTimeout(run, rest);
    else run();
  };
}
