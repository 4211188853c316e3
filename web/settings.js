// The pack's entries in ComfyUI's settings dialog. The server reads the values from ComfyUI's settings file.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Graft.Settings",
  settings: [
    {
      id: "Graft.DatasetRoots",
      category: ["Graft", "Datasets", "DatasetRoots"],
      name: "Folders that datasets may come from",
      tooltip:
        "Absolute paths, separated by semicolons, in addition to ComfyUI's input folder. Press R afterwards, then choose a folder below them in Graft Load Dataset.",
      type: "text",
      defaultValue: "",
    },
    {
      id: "Graft.CacheLimit",
      category: ["Graft", "Datasets", "CacheLimit"],
      name: "Size limit of cached latents and texts (GB)",
      tooltip:
        "When a run starts, Graft deletes the least recently used files in output/graft/cache until it is no larger. It never deletes files that the run needs.",
      type: "number",
      defaultValue: 50,
      attrs: { min: 0, max: 100000 },
    },
    {
      id: "Graft.GiveWay",
      category: ["Graft", "Training", "GiveWay"],
      name: "Trainings give way to other prompts",
      tooltip:
        "When another prompt waits, the training pauses and continues behind it. Short prompts have no training. It holds for trainings that start afterwards, unless Graft Run Options say otherwise.",
      type: "combo",
      options: ["off", "to everything", "to short prompts"],
      defaultValue: "off",
    },
    {
      id: "Graft.GiveWayAfter",
      category: ["Graft", "Training", "GiveWayAfter"],
      name: "Least training time before a training gives way (seconds)",
      tooltip: "Each pause costs a save and the loading of the models.",
      type: "number",
      defaultValue: 60,
      attrs: { min: 0, max: 86400 },
    },
    {
      id: "Graft.GiveWayKeep",
      category: ["Graft", "Training", "GiveWayKeep"],
      name: "Time that a training that gave way stays prepared in memory (minutes)",
      tooltip: "Its return is faster then. ComfyUI frees this memory when it needs it. 0: not at all.",
      type: "number",
      defaultValue: 10,
      attrs: { min: 0, max: 1440 },
    },
  ],
});
