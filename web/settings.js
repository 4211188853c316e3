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
        "Absolute paths, separated by semicolons, besides ComfyUI's input folder. Press R afterwards: the folders below them can then be chosen in Graft Load Dataset.",
      type: "text",
      defaultValue: "",
    },
    {
      id: "Graft.CacheLimit",
      category: ["Graft", "Datasets", "CacheLimit"],
      name: "Size limit of cached latents and texts (GB)",
      tooltip:
        "When a run starts, what was not used for longest is removed until output/graft/cache is no larger. What that run needs always stays.",
      type: "number",
      defaultValue: 50,
      attrs: { min: 0, max: 100000 },
    },
  ],
});
