// Where a training is in the page's graph.

// The node of an execution id, "12" or "1:2:3" for a node inside subgraphs; null where there is none.
export function nodeOf(root, id) {
  let graph = root;
  let node = null;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(part) ?? null;
    graph = node?.subgraph ?? null;
  }
  return node;
}

// Whether a training was queued from the workflow that is open; one that no page queued may be any workflow's.
export function isOf(training, root) {
  return training.workflow === "" || training.workflow === root?.id;
}
