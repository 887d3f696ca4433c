'use strict';
// Netron offers no interface to a page around it: what is used of its view is looked for, and its absence is said.
const changes = JSON.parse(document.getElementById('changes').textContent);
const frames = [...document.querySelectorAll('iframe')];
const colors = { changed: '#e08a00', new: '#1d9a3c', gone: '#d0183a' };
const panesOf = { changed: [0, 1], new: [1], gone: [0] };

/** The graph that a pane shows; undefined while it loads. */
function graphOf(pane) {
  const graph = frames[pane].contentWindow?.__view__?.target;
  return graph?._table?.keys ? graph : undefined; // instanceof knows the classes of its own frame only
}

/** Netron's node for a change: by name, or where it has none by what it makes. */
function nodeOf(graph, change) {
  for (const value of graph._table.keys()) {
    if (!value?.type || !Array.isArray(value.outputs)) continue;
    const made = value.outputs.some((argument) => argument.value?.some?.((one) => one.name === change.output));
    if (change.name ? value.name === change.name : made) return value;
  }
  return undefined;
}

/** Outline the nodes that differ. Netron draws anew when its options change, so this is done again and again. */
function mark() {
  for (const pane of [0, 1]) {
    const graph = graphOf(pane);
    if (!graph || graph.marked) continue;
    const wanted = changes.filter((change) => panesOf[change.status].includes(pane));
    const elements = wanted.map((change) => [change, graph._table.get(nodeOf(graph, change))?.element]);
    if (graph._table.size && wanted.length && !elements.some(([, element]) => element)) continue; // not drawn yet
    for (const [change, element] of elements) {
      element?.setAttribute('data-status', change.status);
    }
    const page = frames[pane].contentDocument;
    if (!page.getElementById('statuses')) {
      const style = page.createElement('style');
      style.id = 'statuses'; // a selected node keeps Netron's own color
      style.textContent = Object.entries(colors).map(([status, color]) =>
        `[data-status=${status}]:not(.select) path { stroke: ${color} !important; stroke-width: 3px !important; }`).join('');
      page.head.append(style);
    }
    graph.marked = true;
  }
}

/** Show a node in the panes that have it. */
function show(change) {
  const missing = [];
  for (const pane of panesOf[change.status]) {
    const graph = graphOf(pane);
    const node = graph && nodeOf(graph, change);
    if (!node) {
      missing.push(graph ? 'Netron shows it as part of another node' : 'Netron is not ready, or cannot be steered');
      continue;
    }
    graph.scrollTo(graph.activate(node), 'instant');
  }
  const label = change.name || change.output;
  document.getElementById('said').textContent = missing.length ? `${missing[0]}: look for ${label} with Ctrl+F` : '';
}

function list() {
  const wanted = document.getElementById('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = changes.map((change) => {
    const text = Object.values(change).join(' ').toLowerCase();
    if (!wanted.every((word) => text.includes(word))) return null;
    const row = document.createElement('li'), button = document.createElement('button');
    row.className = change.status;
    const status = document.createElement('b'), detail = document.createElement('small');
    status.textContent = `${change.status} ${change.operator}`;
    detail.textContent = change.detail;
    button.append(status, ` ${change.name || change.output}`, detail);
    button.onclick = () => {
      document.querySelector('button[aria-current=true]')?.removeAttribute('aria-current');
      button.setAttribute('aria-current', 'true');
      show(change);
    };
    row.append(button);
    return row;
  });
  document.getElementById('nodes').replaceChildren(...rows.filter(Boolean));
}

document.getElementById('filter').oninput = list;
document.getElementById('nodes').onkeydown = (event) => {
  const step = { ArrowDown: 'nextElementSibling', ArrowUp: 'previousElementSibling' }[event.key];
  const next = step && event.target.closest('li')?.[step]?.querySelector('button');
  if (next) {
    event.preventDefault();
    next.focus();
    next.click();
  }
};
list();
setInterval(mark, 500);
