// Loads and runs the model that deployment.json describes. The page uses it, and so does the check in Node.

const READERS = {
  float16: Uint16Array, float32: Float32Array, float64: Float64Array, bool: Uint8Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
};
const FLOATS = new Set(['float16', 'float32', 'float64']);

/** A session. `read(name)` gives the bytes of a file beside deployment.json. */
export async function createSession(ort, manifest, read, options = {}) {
  const externalData = await Promise.all(
    manifest.external_data.map(async (path) => ({ path, data: await read(path) })));
  const all = { executionProviders: ['wasm'], ...options, ...(externalData.length ? { externalData } : {}) };
  return ort.InferenceSession.create(await read(manifest.model), all);
}

/** An array out of sample.bin, as a typed array: what is there may not be aligned, so it is copied. */
function stored(entry, data) {
  return new READERS[entry.type](data.slice(entry.offset, entry.offset + entry.bytes).buffer);
}

/** The inputs of a sample. */
export function feedOf(ort, sample, data) {
  const tensors = sample.inputs.map((entry) => {
    let values = stored(entry, data);
    if (entry.type === 'float16' && typeof Float16Array !== 'undefined') values = new Float16Array(values.buffer);
    return [entry.name, new ort.Tensor(entry.type, values, entry.dims)];
  });
  return Object.fromEntries(tensors);
}

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

function numbers(values) {
  return values instanceof Uint16Array ? Float64Array.from(values, fromHalf) : Float64Array.from(values);
}

/** max|d| / max|y| of floats, the share of other elements that differ. */
export function errorOf(entry, data, tensor) {
  const expected = stored(entry, data), found = tensor.data;
  if (tensor.type !== entry.type || tensor.dims.join() !== entry.dims.join()) return Infinity;
  if (!expected.length) return 0;
  if (!FLOATS.has(entry.type)) {
    let wrong = 0;
    for (let i = 0; i < expected.length; i++) wrong += expected[i] !== found[i];
    return wrong / expected.length;
  }
  const y = numbers(expected), z = entry.type === 'float16' ? numbers(found) : found;
  let largest = 0, difference = 0;
  for (let i = 0; i < y.length; i++) {
    if (!Number.isFinite(y[i]) || !Number.isFinite(z[i])) {
      if (!Object.is(y[i], z[i])) return Infinity;
      continue;
    }
    largest = Math.max(largest, Math.abs(y[i]));
    difference = Math.max(difference, Math.abs(y[i] - z[i]));
  }
  return largest ? difference / largest : difference;
}

/** Runs every sample: an entry for each output, with its error. */
export async function check(ort, session, manifest, data) {
  const found = [];
  for (const [index, sample] of manifest.samples.entries()) {
    const outputs = await session.run(feedOf(ort, sample, data));
    for (const entry of sample.outputs) {
      const error = errorOf(entry, data, outputs[entry.name]);
      const agrees = entry.allowed === null || error <= entry.allowed;
      const head = Array.from(outputs[entry.name].data.slice(0, 4), Number);
      found.push({ sample: index + 1, name: entry.name, dims: entry.dims, error, allowed: entry.allowed, agrees, head });
    }
  }
  return found;
}

/** Milliseconds of a run on the first sample: the median and how many runs it is of. */
export async function latency(ort, session, manifest, data, seconds = 1) {
  const feed = feedOf(ort, manifest.samples[0], data), times = [];
  for (let i = 0; i < 3; i++) await session.run(feed);
  for (const end = performance.now() + seconds * 1e3; times.length < 5 || performance.now() < end;) {
    const start = performance.now();
    await session.run(feed);
    times.push(performance.now() - start);
  }
  times.sort((a, b) => a - b);
  return { median_ms: times[times.length >> 1], runs: times.length };
}
