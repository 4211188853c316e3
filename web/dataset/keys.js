// Keys of the dataset page: arrows move, Enter edits the caption, Tab goes to the next one, Ctrl+Z takes an edit back.

export function handleKey(page, event) {
  const { target } = event;
  const tile = page.grid.tiles.find(({ element }) => element.contains(target));
  const isCommand = event.ctrlKey || event.metaKey;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // Search fields and numbers have their own undo.
  const isField = target.matches("input:not([type=checkbox])");
  const act =
    (isCommand && !isField && findCommand(page, key, event.shiftKey)) ||
    (isCommand && key === "f" && (() => page.openSearch())) ||
    (tile && !isCommand && findMove(page, tile, target, event)) ||
    (isCommand && key === "a" && target === tile?.element && (() => page.select(page.dataset.shown))) ||
    // The browser itself would close the dialog at the second press, whatever is not saved.
    (key === "Escape" && !(target.type === "search" && target.value) && (() => page.close()));
  if (!act) return;
  event.preventDefault();
  act();
}

function findCommand(page, key, isShifted) {
  if (key === "z") return isShifted ? () => page.redo() : () => page.undo();
  return key === "y" ? () => page.redo() : null;
}

function findMove(page, tile, target, event) {
  const { key, shiftKey } = event;
  const { grid, dataset, actions } = page;
  const place = grid.placeOf(tile.picture.name);
  if (target === tile.text) {
    if (key === "Escape") return () => tile.element.focus();
    const next = place + (shiftKey ? -1 : 1);
    return key === "Tab" && dataset.shown[next] ? () => grid.goTo(next).text.focus() : null;
  }
  if (target !== tile.element) return null;
  const there = grid.placeAfter(place, key);
  if (there >= 0) return () => grid.goTo(there).element.focus({ preventScroll: true });
  const acts = {
    Enter: () => tile.text.focus(),
    " ": () => page.toggle(tile.picture, event),
    Delete: () => actions.trash(dataset.selected.size ? dataset.chosen : [tile.picture]),
  };
  return acts[key];
}
