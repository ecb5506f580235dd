/** The pass that the page shows: its summary, its arrays, and what follows from a change. Served or embedded alike. */

import { ONLY_SERVED } from "explore/text.js";

const LARGEST = 16 << 20; // bytes of a complete array that is fetched
const SMALL = 1 << 20; // bytes under which a slice fetches the complete array
const MOST_SLICES = 500;

const complete = new Map(); // "group/name" -> promise of {data, shape}
const slices = new Map(); // "group/name?at" -> promise of {data, shape}
const listeners = new Map(); // event -> [callback]

export const store = {
  summary: null,
  served: true,

  /** Read the summary; before anything else. */
  async open() {
    const embedded = document.getElementById("summary");
    store.summary = embedded ? JSON.parse(embedded.textContent) : await (await request("summary")).json();
    store.served = store.summary.served;
  },

  /** The shape of an array; undefined for an unknown one. */
  shape(group, name) {
    return store.summary.arrays[group]?.[name]?.shape;
  },

  /** The size of an array. */
  bytes: (group, name) => bytes(known(group, name)),

  /** A complete array. */
  async array(group, name) {
    const shape = known(group, name);
    if (store.served && bytes(shape) > LARGEST) {
      throw new Error(`${name} takes ${Math.round(bytes(shape) / 1e6)} MB: look at a slice of it`);
    }
    return remember(complete, `${group}/${name}`, async () => ({
      data: store.served ? await numbers(`array/${group}/${encodeURIComponent(name)}`) : await unpack(group, name),
      shape,
    }));
  },

  /** The part of an array at indices and, where null stands, along complete axes, or where [from, to] stands, there. */
  async slice(group, name, at) {
    const shape = known(group, name);
    const key = `${group}/${name}`;
    const wrong = at.length !== shape.length || at.some((i, a) => (Array.isArray(i) ? !(i[0] >= 0 && i[0] < i[1] && i[1] <= shape[a]) : i !== null && !(i >= 0 && i < shape[a])));
    if (wrong) throw new Error(`${written(at)} is not in ${name}, which has shape ${shape.join(" × ")}`);
    if (!store.served || complete.has(key) || bytes(shape) < SMALL) return cut(await store.array(group, name), at);
    const part = async () => ({
      data: await numbers(`array/${group}/${encodeURIComponent(name)}`, at),
      shape: left(shape, at),
    });
    return remember(slices, `${key}?${written(at)}`, part, MOST_SLICES);
  },

  /** Show another text. */
  async run(text, targets = null) {
    const summary = await post("run", { text, targets });
    complete.clear();
    slices.clear();
    store.summary = summary;
    for (const callback of listeners.get("run") ?? []) callback();
    return summary;
  },

  /** The loss with h added to one number of a parameter. */
  nudge: (name, index, h) => post("nudge", { name, index, h }),

  /** The loss and predictions with part of an activation, or heads, set to 0. */
  ablate: (body) => post("ablate", body),

  /** The loss and predictions after one step of AdamW on this text. */
  updated: (lr) => post("updated", { lr }),

  /** The loss with each head set to 0; for a large model this takes a while, see progress. */
  async heads() {
    store.summary.heads ??= await post("heads", {});
    return store.summary.heads;
  },

  /** Progress of the running computation: {done, of}, or nulls. */
  progress: async () => (await request("progress")).json(),

  /** torch's numbers for the same slice; fails where PyTorch is not installed. */
  async torch(group, name, at) {
    if (!store.served) throw new Error(ONLY_SERVED);
    return { data: await numbers(`torch/${group}/${encodeURIComponent(name)}`, at), shape: left(known(group, name), at) };
  },

  /** Call back on an event: "run", when there is another pass. */
  on(event, callback) {
    listeners.set(event, [...(listeners.get(event) ?? []), callback]);
  },
};

const size = (shape) => shape.reduce((a, b) => a * b, 1);
const bytes = (shape) => size(shape) * (store.summary.dtype === "float64" ? 8 : 4);
const written = (at) => at.map((i) => (i === null ? ":" : Array.isArray(i) ? i.join(":") : i)).join(",");

/** The shape of a slice. */
const left = (shape, at) => shape.flatMap((n, axis) => (at[axis] === null ? [n] : Array.isArray(at[axis]) ? [at[axis][1] - at[axis][0]] : []));

function known(group, name) {
  const shape = store.shape(group, name);
  if (!shape) throw new Error(`there is no ${name} among the ${group}`);
  return shape;
}

/** A promise by its key, made once; a failed one is forgotten, and so is the oldest over `most`. */
function remember(cache, key, make, most = Infinity) {
  if (!cache.has(key)) {
    if (cache.size >= most) cache.delete(cache.keys().next().value);
    const made = make();
    cache.set(key, made);
    made.catch(() => cache.get(key) === made && cache.delete(key));
  }
  return cache.get(key);
}

/** A slice of a complete array, as NumPy cuts it. */
function cut({ data, shape }, at) {
  let offsets = [0];
  let stride = size(shape);
  shape.forEach((n, axis) => {
    stride /= n;
    const [from, to] = at[axis] === null ? [0, n] : Array.isArray(at[axis]) ? at[axis] : [at[axis], at[axis] + 1];
    const along = Array.from({ length: to - from }, (_, i) => from + i);
    offsets = offsets.flatMap((offset) => along.map((i) => offset + i * stride));
  });
  return { data: data.constructor.from(offsets, (i) => data[i]), shape: left(shape, at) };
}

/** The numbers under an address, of which `at` says the slice. */
async function numbers(path, at = null) {
  const query = new URLSearchParams({ run: store.summary.run });
  if (at) query.set("at", written(at));
  return typed(await (await request(`${path}?${query}`)).arrayBuffer());
}

const typed = (buffer) => new (store.summary.dtype === "float64" ? Float64Array : Float32Array)(buffer);

/** An embedded array: base64 of the gzip of its bytes, all first ones, then all second ones, and so on. */
async function unpack(group, name) {
  const text = document.getElementById(`array:${group}/${name}`).textContent;
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const width = store.summary.dtype === "float64" ? 8 : 4;
  const count = planes.length / width;
  const data = new Uint8Array(planes.length);
  for (let b = 0; b < width; b++) {
    for (let i = 0; i < count; i++) data[i * width + b] = planes[b * count + i];
  }
  return typed(data.buffer);
}

async function request(path, options = {}) {
  const response = await fetch(`./${path}`, { cache: "no-store", ...options }).catch(() => {
    throw new Error("The server has ended: start numpy-gpt explore again.");
  });
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Error(said.error ?? `the server answered ${response.status}`);
  }
  return response;
}

async function post(path, body) {
  if (!store.served) throw new Error(ONLY_SERVED);
  const query = path === "run" ? "" : `?run=${store.summary.run}`;
  const headers = { "Content-Type": "application/json" };
  return (await request(path + query, { method: "POST", headers, body: JSON.stringify(body) })).json();
}
