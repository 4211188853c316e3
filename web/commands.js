// ComfyUI commands, for its menu and its key bindings: control the running training, open the history and the dataset page.
import { t, text } from "./texts.js";

export const TAB = "graft-history";

export function makeCommands({ openHistory, openDataset, store, routes, toasts }) {
  const live = () => store.list().findLast((training) => training.isLive);
  const ask = (wish) =>
    toasts.attempt(async () => {
      const training = live();
      if (training) await routes.ask(training, wish);
      else toasts.show("info", t("Nothing is training"));
    });
  const pauseOrResume = async () => {
    if (live()) return ask("pause");
    const waiting = store.waiting.at(-1);
    if (waiting) return toasts.attempt(() => routes.removePrompt(waiting.prompt));
    const halted = store.list().findLast((training) => training.isResumable);
    if (halted) return toasts.attempt(() => routes.resume(halted));
    const none = t("No training was stopped or paused since the server started.");
    return toasts.show("info", t("Nothing is training"), none);
  };
  // [id, icon, name, action]
  const commands = [
    ["Graft.OpenHistory", "pi-chart-line", text("Graft: Open run history"), openHistory],
    ["Graft.OpenDataset", "pi-images", text("Graft: Open dataset"), openDataset],
    ["Graft.Stop", "pi-stop", text("Graft: Stop training and keep the result"), () => ask("stop")],
    ["Graft.Save", "pi-save", text("Graft: Save training now"), () => ask("save")],
    ["Graft.Pause", "pi-pause", text("Graft: Pause or resume training"), pauseOrResume],
  ];
  // Translate late: the texts load after the commands are registered.
  return commands.map(([id, icon, name, work]) => ({ id, icon: `pi ${icon}`, label: () => t(name), function: work }));
}
