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
  ],
});
