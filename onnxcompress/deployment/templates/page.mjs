import * as ort from './ort/ort.wasm.min.mjs';
import { check, createSession, latency } from './model.mjs';

const say = (text) => { document.getElementById('status').textContent = text; };
const exact = (bytes) => `${bytes.toLocaleString('en')} bytes`;

function row(table, ...cells) {
  const line = document.getElementById(table).tBodies[0].insertRow();
  for (const cell of cells) line.insertCell().textContent = cell;
  return line;
}

async function read(name) {
  const reply = await fetch(name.split('/').map(encodeURIComponent).join('/'));
  if (!reply.ok) throw new Error(`${name}: ${reply.status} ${reply.statusText}`);
  return new Uint8Array(await reply.arrayBuffer());
}

/** Bytes over the wire, after the server's compression; 0 where the browser took them from its cache. */
function fetched(name) {
  const url = new URL(name.split('/').map(encodeURIComponent).join('/'), location.href).href;
  return performance.getEntriesByName(url).reduce((most, entry) => Math.max(most, entry.encodedBodySize), 0);
}

async function main() {
  const manifest = JSON.parse(new TextDecoder().decode(await read('deployment.json')));
  document.title = manifest.model;
  document.getElementById('model').textContent = manifest.model;
  // More threads need the headers Cross-Origin-Opener-Policy: same-origin, Cross-Origin-Embedder-Policy: require-corp.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.wasmPaths = new URL('./ort/', location.href).href;
  say('downloading');
  const files = new Map();
  for (const name of [manifest.model, ...manifest.external_data]) files.set(name, await read(name));
  const data = await read(manifest.sample_file);
  const bytes = [...files.values()].reduce((sum, one) => sum + one.length, 0);
  const served = [...files.keys()].reduce((sum, name) => sum + fetched(name), 0);
  const packed = manifest.model_gzip_bytes === null ? '' : `${exact(manifest.model_gzip_bytes)} after gzip; `;
  row('figures', 'model', `${exact(bytes)} (${packed}${served ? `${exact(served)} as served` : 'out of the cache'})`);
  row('figures', 'onnxruntime-web', `${ort.env.versions.web}, ${exact(manifest.runtime_bytes)}`);
  say('loading');
  const start = performance.now();
  const session = await createSession(ort, manifest, async (name) => files.get(name));
  const load = performance.now() - start;
  row('figures', 'load, runtime included', `${load.toFixed(1)} ms`);
  say('running');
  const outputs = await check(ort, session, manifest, data);
  for (const one of outputs) {
    const limit = one.allowed === null ? 'random' : one.allowed.toExponential(0);
    const line = row('outputs', one.sample, one.name, `[${one.dims}]`, one.error.toExponential(1), limit,
      one.agrees ? 'agrees' : 'DIFFERS', one.head.map((value) => value.toPrecision(5)).join(', '));
    line.className = one.agrees ? 'good' : 'bad';
  }
  const timed = await latency(ort, session, manifest, data);
  row('figures', 'latency', `${timed.median_ms.toFixed(3)} ms (median of ${timed.runs} runs)`);
  row('figures', 'threads', String(ort.env.wasm.numThreads));
  const agrees = outputs.every((one) => one.agrees);
  say(agrees ? 'all outputs agree with those of onnxruntime in Python' : 'outputs differ from those of onnxruntime in Python');
  return { agrees, load_ms: load, latency_ms: timed.median_ms, bytes, outputs, version: ort.env.versions.web };
}

try {
  const result = await main();
  document.getElementById('result').textContent = JSON.stringify(result);
  document.body.dataset.state = result.agrees ? 'agrees' : 'differs';
} catch (error) {
  say(`failed: ${error.message ?? error}`);
  document.body.dataset.state = 'failed';
}
