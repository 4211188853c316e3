// Use of a saved step in the open graph.

// Add ComfyUI's own loader with a LoRA chosen, in the middle of the visible area.
export function addLoader(app, name) {
  const node = window.LiteGraph.createNode("LoraLoader");
  const [x, y, width, height] = app.canvas.visible_area;
  node.pos = [Math.round(x + (width - node.size[0]) / 2), Math.round(y + (height - node.size[1]) / 2)];
  app.canvas.graph.add(node);
  node.widgets.find((widget) => widget.name === "lora_name").value = name;
  app.canvas.selectNode?.(node);
}
