// A second reader of .amkv files, written from the text of formats/amkv-v1.md alone, to prove that
// the text is enough. Node's standard library only.
//
//     node reader.mjs FILE...
//
// prints one JSON object a line: {"file", "code", "stage", "message"} for a file that is refused
// (stage: open or verify), {"file", "manifest", "tensors", "payload_hash", "ratio", "entries"} for
// one that is not; entries are SHA-256 of the keys and values as 32-bit floats, codes decoded.

import { createHash } from "node:crypto";
import { closeSync, constants, fstatSync, openSync, readFileSync } from "node:fs";

import { Refusal, byCodePoint, canonical, parse } from "./json.mjs";
import { bitsOf, check } from "./manifest.mjs";
import { GROUP, ITEM, block, decoded } from "./numbers.mjs";

const MAX_HEADER = 16777216n;
const MAX_MANIFEST = 8388608;
const MAX_TENSORS = 65536;
const MAX_DIMENSION = 281474976710655n;
const NAME = /^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$/;

const sha256 = (data) => createHash("sha256").update(data).digest("hex");

// ---- section 3: the container ----

function load(path) {
  const descriptor = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  try {
    if (!fstatSync(descriptor).isFile()) throw new Refusal("not-regular-file", path);
    return readFileSync(descriptor);
  } finally {
    closeSync(descriptor);
  }
}

function container(file) {
  if (file.length < 8) throw new Refusal("file-too-short", `${file.length} bytes`);
  const length = file.readBigUInt64LE(0);
  if (length > MAX_HEADER) throw new Refusal("header-too-large", `${length}`);
  if (8n + length > BigInt(file.length)) throw new Refusal("header-truncated", `${length}`);
  if (length % 8n) throw new Refusal("misaligned", `a header of ${length} bytes`);
  const payload = 8 + Number(length);
  let last = payload - 1;
  while (last >= 8 && file[last] === 0x20) last--;
  if (file[8] !== 0x7b || file[last] !== 0x7d) throw new Refusal("header-frame", "no braces");
  let text;
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    text = decoder.decode(file.subarray(8, payload));
  } catch {
    throw new Refusal("header-encoding", "not UTF-8");
  }
  const header = parse(text);
  const manifest = metadata(header.get("__metadata__"));
  header.delete("__metadata__");
  if (header.size > MAX_TENSORS) throw new Refusal("too-many-tensors", `${header.size}`);
  const tensors = [...header].map(([name, entry]) => tensor(name, entry, file, payload));
  covered(tensors, file.length - payload);
  return { manifest, tensors: new Map(tensors.map((t) => [t.name, t])) };
}

function metadata(value) {
  if (value === undefined) throw new Refusal("metadata", "absent");
  if (!(value instanceof Map) || [...value.values()].some((v) => typeof v !== "string")) {
    throw new Refusal("header-schema", "__metadata__");
  }
  if (value.size !== 1 || !value.has("amkv")) throw new Refusal("metadata", "other keys");
  const text = value.get("amkv");
  if (Buffer.byteLength(text) > MAX_MANIFEST) throw new Refusal("manifest-too-large", "");
  return text;
}

function tensor(name, entry, file, payload) {
  const schema = () => new Refusal("header-schema", name);
  if (!(entry instanceof Map) || entry.size !== 3) throw schema();
  const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((k) => entry.get(k));
  if (typeof dtype !== "string" || !Array.isArray(shape) || !Array.isArray(offsets)) throw schema();
  if (offsets.length !== 2 || offsets.some((n) => typeof n !== "bigint" || n < 0n)) throw schema();
  if (name.length > 256 || !NAME.test(name)) throw new Refusal("tensor-name", name);
  if (!Object.hasOwn(ITEM, dtype)) throw new Refusal("tensor-dtype", dtype);
  const dimension = (n) => typeof n === "bigint" && n >= 0n && n <= MAX_DIMENSION;
  if (shape.length < 1 || shape.length > 8 || !shape.every(dimension)) {
    throw new Refusal("tensor-shape", name);
  }
  const [begin, end] = offsets;
  const size = shape.reduce((a, b) => a * b, BigInt(ITEM[dtype]));
  if (end - begin !== size) throw new Refusal("tensor-size", name);
  if (BigInt(payload) + end > BigInt(file.length)) throw new Refusal("payload-truncated", name);
  if (begin % BigInt(ITEM[dtype])) throw new Refusal("misaligned", name);
  const data = file.subarray(payload + Number(begin), payload + Number(end));
  return { name, dtype, shape: shape.map(Number), begin: Number(begin), data };
}

function covered(tensors, bytes) {
  let cursor = 0;
  for (const t of [...tensors].sort((a, b) => a.begin - b.begin || a.data.length - b.data.length)) {
    if (t.begin > cursor) throw new Refusal("payload-gap", t.name);
    if (t.begin < cursor) throw new Refusal("payload-overlap", t.name);
    cursor += t.data.length;
  }
  if (cursor !== bytes) throw new Refusal("payload-trailing", `${bytes - cursor} bytes`);
}

// ---- section 5: the tensors that a manifest calls for ----

// What is stored of a layer's keys or values: suffix of the name, dtypes, shape.
function matrix(layer, part, dim, floats) {
  const { store, rows, stored } = layer;
  const bits = bitsOf(store);
  if (bits === null) return [["", floats, [rows, dim]]];
  const codes = ["", [store === "int8" ? "I8" : "U8"], [rows, (dim * bits[part]) / 8]];
  if (bits.packed && part === "keys") {
    const groups = stored.reduce((sum, t) => sum + Math.ceil(t / GROUP), 0);
    return [codes, [".scale", ["F16"], [groups, dim]], [".zero", ["F16"], [groups, dim]]];
  }
  return [codes, [".scale", ["F16"], [rows, dim / block(dim, bits.packed ? 64 : 32)]]];
}

function wanted(outline) {
  const floats = ["F32", "BF16", "F16"];
  const found = new Map([["token_ids", { dtypes: ["I32"], shape: [outline.T], must: true }]]);
  outline.layers.forEach((layer, l) => {
    for (const [part, dim] of [["keys", layer.keyDim], ["values", layer.valueDim]]) {
      const name = `layers.${l}.${part}`;
      for (const [suffix, dtypes, shape] of matrix(layer, part, dim, floats)) {
        found.set(name + suffix, { dtypes, shape, must: true });
      }
    }
    if (outline.kind === "compact" && layer.type === "full") {
      found.set(`layers.${l}.beta`, { dtypes: ["F32"], shape: [layer.rows] });
      found.set(`layers.${l}.positions`, { dtypes: ["I32"], shape: [layer.rows] });
    }
  });
  for (let n = 0; n < outline.states; n++) {
    found.set(`states.${n}`, { dtypes: floats, shape: null, must: true });
  }
  return found;
}

function compare(outline, tensors) {
  const want = wanted(outline);
  for (const [name, { dtypes, shape, must }] of want) {
    const t = tensors.get(name);
    if (t === undefined) {
      if (must) throw new Refusal("tensor-missing", name);
      continue;
    }
    const same = shape === null || JSON.stringify(shape) === JSON.stringify(t.shape);
    if (!dtypes.includes(t.dtype) || !same) throw new Refusal("tensor-mismatch", name);
  }
  for (const name of tensors.keys()) {
    if (!want.has(name) && !name.startsWith("ext.")) throw new Refusal("tensor-unexpected", name);
  }
  const dtypes = new Set();
  outline.layers.forEach((layer, l) => {
    if (layer.store !== "native") return;
    for (const part of ["keys", "values"]) dtypes.add(tensors.get(`layers.${l}.${part}`).dtype);
  });
  if (dtypes.size > 1) throw new Refusal("tensor-mismatch", "keys and values of two dtypes");
}

// Section 6.
function ratio(outline, tensors) {
  let [full, stored] = [0, 0];
  outline.layers.forEach((layer, l) => {
    if (layer.type !== "full") return;
    const own = ITEM[tensors.get(`layers.${l}.keys`).dtype];
    const size = layer.store === "native" ? own : outline.modelBytes;
    full += outline.T * layer.heads * (layer.keyDim + layer.valueDim) * size;
    for (const [name, t] of tensors) if (name.startsWith(`layers.${l}.`)) stored += t.data.length;
  });
  if (full && !stored) throw new Refusal("ratio-mismatch", "nothing is stored");
  const found = full ? full / stored : 1;
  if (outline.ratio !== null && Math.abs(outline.ratio - found) > 0.01 * found) {
    throw new Refusal("ratio-mismatch", `${outline.ratio}, not ${found}`);
  }
  return found;
}

// ---- sections 8 and 11: what reads the payload ----

function verify(text, manifest, outline, tensors) {
  if (canonical(manifest) !== text) throw new Refusal("manifest-not-canonical", "");
  if (outline.manifestHash !== null) {
    const rest = new Map([...manifest].filter(([name]) => name !== "manifest_hash"));
    const found = `sha256:${sha256(canonical(rest))}`;
    if (found !== outline.manifestHash) throw new Refusal("manifest-hash", found);
  }
  for (const t of tensors.values()) {
    if (t.name.startsWith("ext.")) continue;
    if (t.name === "token_ids") within(t, 0, 2147483647, "token-id");
    else if (t.name.endsWith(".positions")) within(t, -1, outline.T - 1, "position");
    else if (t.name.endsWith(".scale")) finite(t, "scale", true);
    else if (t.dtype !== "I8" && t.dtype !== "U8") finite(t, "not-finite", false);
    else if (!bitsOf(outline.layers[Number(t.name.split(".")[1])].store).packed) codes(t);
  }
  const found = payloadHash(tensors);
  if (found !== outline.payloadHash) throw new Refusal("payload-hash", found);
}

function payloadHash(tensors) {
  const names = [...tensors.keys()].sort(byCodePoint);
  const lines = names.map((name) => {
    const { dtype, shape, data } = tensors.get(name);
    return `${name} ${dtype} [${shape.join(",")}] ${sha256(data)}\n`;
  });
  return `sha256:${sha256(lines.join(""))}`;
}

function within(t, low, high, code) {
  for (let at = 0; at < t.data.length; at += 4) {
    const value = t.data.readInt32LE(at);
    if (value < low || value > high) throw new Refusal(code, `${t.name}: ${value}`);
  }
}

function finite(t, code, positive) {
  const size = ITEM[t.dtype];
  const all = { F32: 0x7f800000, BF16: 0x7f80, F16: 0x7c00 }[t.dtype];
  for (let at = 0; at < t.data.length; at += size) {
    const bits = t.data.readUIntLE(at, size);
    if ((bits & all) === all || (positive && bits >>> (8 * size - 1))) {
      throw new Refusal(code, t.name);
    }
  }
}

function codes(t) {
  const bad = t.dtype === "I8" ? (b) => b === 0x80 : (b) => !(b & 15) || !(b >> 4);
  if (t.data.some(bad)) throw new Refusal("code", t.name);
}

// ---- the program ----

function read(path) {
  let stage = "open";
  try {
    const { manifest: text, tensors } = container(load(path));
    const manifest = parse(text);
    const outline = check(manifest);
    compare(outline, tensors);
    const found = ratio(outline, tensors);
    stage = "verify";
    verify(text, manifest, outline, tensors);
    const entries = {};
    outline.layers.forEach((layer, l) => {
      for (const [part, dim] of [["keys", layer.keyDim], ["values", layer.valueDim]]) {
        const name = `layers.${l}.${part}`;
        const rows = decoded(layer, tensors, name, dim, part);
        entries[name] = sha256(Buffer.from(rows.buffer));
      }
    });
    const described = [...tensors.values()].map(({ name, dtype, shape, data }) => [
      name,
      { dtype, shape, sha256: sha256(data) },
    ]);
    return {
      file: path,
      manifest: text,
      tensors: Object.fromEntries(described),
      payload_hash: payloadHash(tensors),
      ratio: found,
      entries,
    };
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return { file: path, code: error.code, stage, message: error.message };
  }
}

for (const path of process.argv.slice(2)) console.log(JSON.stringify(read(path)));
