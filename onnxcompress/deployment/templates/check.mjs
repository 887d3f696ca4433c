// Runs the folder's samples on onnxruntime-web in Node, with the very files that the page loads: node check.mjs
// Prints one line of JSON; exit code 1 where an output differs. With a number: time runs for so many seconds.

import { readFile } from 'node:fs/promises';
import { check, createSession, latency } from './model.mjs';

const read = async (name) => new Uint8Array(await readFile(new URL(name.split('/').map(encodeURIComponent).join('/'), import.meta.url)));
const ort = await import('./ort/ort.wasm.min.mjs');
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmBinary = await read('ort/ort-wasm-simd-threaded.wasm');
const manifest = JSON.parse(new TextDecoder().decode(await read('deployment.json')));
const data = await read(manifest.sample_file);
await createSession(ort, manifest, read); // starts the runtime
let session;
const loads = [];
for (let i = 0; i < 3; i++) {
  await session?.release();
  const start = performance.now();
  session = await createSession(ort, manifest, read);
  loads.push(performance.now() - start);
}
const outputs = await check(ort, session, manifest, data);
const timed = await latency(ort, session, manifest, data, Number(process.argv[2] ?? 1));
const agrees = outputs.every((one) => one.agrees);
const finite = outputs.map((one) => ({ ...one, error: Number.isFinite(one.error) ? one.error : null }));
console.log(JSON.stringify({ agrees, version: ort.env.versions.web, load_ms: loads.sort((a, b) => a - b)[1], latency_ms: timed.median_ms, outputs: finite }));
process.exit(agrees ? 0 : 1);
