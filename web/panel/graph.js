// Lookup of a training's nodes in the page's graph, comparison of their inputs, and repair of saved subgraph nodes.

// Return the nodes on the path to an execution id, "12" or "1:2:3" for a node inside subgraphs: outermost first, the
// node itself last; empty if there is no such node.
export function pathOf(root, id) {
  const path = [];
  let graph = root;
  for (const part of id.split(":")) {
    const node = graph?.getNodeById(part) ?? null;
    if (!node) return [];
    path.push(node);
    graph = node.subgraph ?? null;
  }
  return path;
}

export function* allNodes(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph, seen);
  }
}

const OPTION_NODE = /^Graft[A-Z][a-z]+Options$/;

// Report whether a node of a prompt, and all nodes upstream, have the inputs that a training was queued with.
// sources: {id: {class_type, inputs}}, the inputs that decide a run; other inputs do not matter.
// declare: returns the inputs that a node type declares, {name: [type, properties]}.
export function hasSources(prompt, id, sources, node, declare) {
  const seen = new Set();
  const isSame = (mine, theirs) => {
    const key = `${mine} ${theirs}`;
    if (seen.has(key)) return true;
    seen.add(key);
    const [ours, known] = [prompt[mine], sources[theirs]];
    if (!ours || !known || ours.class_type !== known.class_type) return false;
    const declared = declare(ours.class_type);
    const names = new Set([...Object.keys(known.inputs), ...Object.keys(ours.inputs)]);
    return [...names].every((name) => {
      // The steps of a trainer before this one decide what the run starts from.
      const decides = name === "steps" && mine !== id && "dataset" in declared;
      if (isNeutral(declared[name]) && !decides) return true;
      const [value, wanted] = [ours.inputs[name], known.inputs[name]];
      const [from, wantedFrom] = [sourceOf(value, prompt, declare), linkOf(wanted, sources)];
      if (from || wantedFrom) return Boolean(from && wantedFrom && from[1] === wantedFrom[1] && isSame(from[0], wantedFrom[0]));
      return !(name in known.inputs) || JSON.stringify(value) === JSON.stringify(wanted);
    });
  };
  return isSame(id, node);
}

function isNeutral(input) {
  return Boolean(input?.[1]?.graft_neutral);
}

// Return a value that links to another node's output, [id, slot], else null.
function linkOf(value, prompt) {
  return Array.isArray(value) && value.length === 2 && Object.hasOwn(prompt, value[0]) ? value : null;
}

// Return a value's link past the option nodes that set nothing, null if it is no link or nothing precedes them.
function sourceOf(value, prompt, declare) {
  const seen = new Set();
  let link = linkOf(value, prompt);
  while (link && !seen.has(link[0]) && setsNothing(prompt[link[0]], declare)) {
    seen.add(link[0]);
    link = linkOf(prompt[link[0]].inputs.options, prompt);
  }
  return link;
}

// Report whether a prompt's node is an option node whose inputs that affect a run all have their unset values.
function setsNothing({ class_type: kind, inputs }, declare) {
  if (!OPTION_NODE.test(kind)) return false;
  const declared = declare(kind);
  return Object.entries(inputs).every(
    ([name, value]) => name === "options" || isNeutral(declared[name]) || value === declared[name]?.[1]?.default,
  );
}

// Keep the edits of subgraph nodes in a saved workflow whose subgraph holds a node of these kinds.
export function keepEdits({ nodes, definitions }, kinds) {
  const subgraphs = definitions?.subgraphs ?? [];
  const inner = new Map(subgraphs.map((subgraph) => [subgraph.id, subgraph.nodes ?? []]));
  const holds = (id, seen = []) =>
    !seen.includes(id) && (inner.get(id) ?? []).some(({ type }) => kinds.has(type) || holds(type, [...seen, id]));
  for (const node of [nodes ?? [], ...inner.values()].flat()) {
    if (node.properties && holds(node.type)) dropQuarantine(node.properties);
  }
}

// Let the links in the subgraphs of a saved workflow end at the inputs they ended at. The frontend finds an input by its
// place in this version of a node, and a later version may have a new one in front.
export function keepLinks({ definitions }, namesOf) {
  for (const { nodes = [], links = [] } of definitions?.subgraphs ?? []) {
    for (const { id, type, inputs = [] } of nodes) {
      const names = namesOf(type, inputs);
      for (const link of links) {
        const place = link.target_id === id ? names.indexOf(inputs[link.target_slot]?.name) : -1;
        if (place >= 0) link.target_slot = place;
      }
    }
  }
}

// Remove the values that newer frontends quarantine for a linked widget ("-1"): at the next load they would replace
// the user's edits in widgets_values.
export function dropQuarantine(properties) {
  const entries = properties.proxyWidgetErrorQuarantine;
  if (!Array.isArray(entries)) return;
  const kept = entries.filter(({ originalEntry }) => originalEntry?.[0] !== "-1");
  if (kept.length) properties.proxyWidgetErrorQuarantine = kept;
  else delete properties.proxyWidgetErrorQuarantine;
}
