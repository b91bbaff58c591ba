// Section 4 of amkv-v1.md: the fields of a manifest, and what it calls for.

import { Refusal } from "./json.mjs";

const NAME_CHARS = 256;
const LAYERS = 4096;
const TOKENS = 2147483647n;
const BIG = 9223372036854775807n;
const FEATURES = ["store-int8", "store-int4", "states", "store-packed", "store-mixed"];
const PACKED = /^k([8432])v([8432])$/;
const MULTIPLE = { 8: 1, 4: 2, 3: 8, 2: 4 };

// The bits of codes of keys and of values in a store; null where it has no codes.
export function bitsOf(store) {
  if (store === "native") return null;
  const packed = PACKED.exec(store);
  if (packed !== null) return { keys: Number(packed[1]), values: Number(packed[2]), packed: true };
  const bits = store === "int8" ? 8 : 4;
  return { keys: bits, values: bits, packed: false };
}

const wrongType = (path) => new Refusal("field-type", path);
const wrongValue = (path) => new Refusal("field-value", path);
const conflict = (path) => new Refusal("field-conflict", path);

// ---- values of one field ----

function object(value, path) {
  if (!(value instanceof Map)) throw wrongType(path);
  return value;
}

function get(map, key, path) {
  if (!map.has(key)) throw new Refusal("field-missing", `${path}.${key}`);
  return map.get(key);
}

function array(value, path, low = 0, high = LAYERS) {
  if (!Array.isArray(value)) throw wrongType(path);
  if (value.length < low || value.length > high) throw wrongValue(path);
  return value;
}

function exactly(value, path, count) {
  if (!Array.isArray(value)) throw wrongType(path);
  if (value.length !== count) throw conflict(path);
  return value;
}

function text(value, path) {
  if (typeof value !== "string") throw wrongType(path);
  const length = [...value].length;
  if (length < 1 || length > NAME_CHARS || /[\x00-\x1f\x7f-\x9f]/.test(value)) {
    throw wrongValue(path);
  }
  return value;
}

function pattern(regex) {
  return (value, path) => {
    if (!regex.test(text(value, path))) throw wrongValue(path);
    return value;
  };
}

const hash = pattern(/^sha256:[0-9a-f]{64}$/);
const hexDigest = pattern(/^[0-9a-f]{64}$/);
const sampled = /^(?:[0-9a-f]{8}){1,1024}$/;
const fileName = pattern(/^(?!\.{1,2}$)[^/\\]+$/);

function choice(value, path, allowed) {
  if (!allowed.includes(text(value, path))) throw wrongValue(path);
  return value;
}

function integer(value, path, low, high) {
  if (typeof value !== "bigint") throw wrongType(path);
  if (value < low || value > high) throw wrongValue(path);
  return value;
}

function number(value, path, least = "above 0") {
  if (typeof value !== "bigint" && typeof value !== "number") throw wrongType(path);
  if (least === "above 0" ? !(value > 0) : !(value >= 0)) throw wrongValue(path);
  return Number(value);
}

const share = (value, path) => number(value, path, "at least 0");
const count = (value, path) => integer(value, path, 0n, BIG);

function optional(map, key, path, check) {
  return map.has(key) ? check(map.get(key), `${path}.${key}`) : undefined;
}

// ---- the manifest ----

export function check(manifest) {
  const root = object(manifest, "manifest");
  const field = (key) => get(root, key, "manifest");
  const minor = identity(field);
  const kind = choice(field("kind"), "kind", ["prefill", "compact"]);
  created(field("created"));
  const model = object(field("model"), "model");
  about(model, field);
  const T = Number(integer(field("logical_length"), "logical_length", 1n, TOKENS));
  const start = integer(field("document_start"), "document_start", 0n, TOKENS);
  const end = integer(field("document_end"), "document_end", 0n, TOKENS);
  if (start > end || end > T) throw conflict("document_end");
  choice(field("boundary"), "boundary", ["raw", "in_user_turn", "turn_closed"]);
  const layers = layersOf(get(model, "layers", "model"), field("stored"), kind, T);
  const dtype = choice(get(model, "dtype", "model"), "dtype", ["float32", "bfloat16", "float16"]);
  let ratio = null;
  const used = new Set();
  if (kind === "compact") {
    ratio = compaction(root, field, layers);
    storesOf(root, layers, used);
  }
  const states = root.has("states") ? statesOf(root.get("states")) : 0;
  if (states) used.add("states");
  const required = new Set(field("features_required"));
  if (used.size !== required.size || [...used].some((x) => !required.has(x))) {
    throw conflict("features_required");
  }
  const modelBytes = dtype === "float32" ? 4 : 2;
  const payloadHash = hash(field("payload_hash"), "payload_hash");
  if (minor >= 3) field("manifest_hash");
  const manifestHash = optional(root, "manifest_hash", "", hash) ?? null;
  return { kind, T, layers, ratio, states, modelBytes, payloadHash, manifestHash };
}

function identity(field) {
  if (field("format") !== "amkv") throw new Refusal("format-unknown", "format");
  const version = text(field("version"), "version");
  const parts = /^(0|[1-9][0-9]{0,4})\.(0|[1-9][0-9]{0,4})$/.exec(version);
  if (parts === null) throw wrongValue("version");
  if (parts[1] !== "1") throw new Refusal("version-unsupported", version);
  for (const feature of array(field("features_required"), "features_required")) {
    if (typeof feature !== "string") throw wrongType("features_required");
    if (!FEATURES.includes(feature)) throw new Refusal("feature-unsupported", feature);
  }
  return Number(parts[2]);
}

function created(value) {
  const form = /^(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(\.\d{1,9})?Z$/;
  const parts = form.exec(text(value, "created"));
  if (parts === null) throw wrongValue("created");
  const [year, month, day, hour, minute, second] = parts.slice(1, 7).map(Number);
  const days = new Date(Date.UTC(2000 + (year % 400), month, 0)).getUTCDate();
  const valid = year > 0 && month >= 1 && month <= 12 && day >= 1 && day <= days;
  if (!valid || hour > 23 || minute > 59 || second > 59) throw wrongValue("created");
}

function about(model, field) {
  text(get(model, "id", "model"), "model.id");
  const revision = get(model, "revision", "model");
  if (revision !== null) text(revision, "model.revision");
  text(get(model, "architecture", "model"), "model.architecture");
  hash(get(model, "config_hash", "model"), "model.config_hash");
  object(get(model, "rope", "model"), "model.rope");
  optional(model, "config", "model", object);
  optional(model, "weights", "model", weightsOf);
  const tokenizer = object(field("tokenizer"), "tokenizer");
  hash(get(tokenizer, "hash", "tokenizer"), "tokenizer.hash");
  const template = get(tokenizer, "template_hash", "tokenizer");
  if (template !== null) hash(template, "tokenizer.template_hash");
  optional(tokenizer, "turns_hash", "tokenizer", hash);
  const source = object(field("source"), "source");
  fileName(get(source, "name", "source"), "source.name");
  hexDigest(get(source, "sha256", "source"), "source.sha256");
  const characters = count(get(source, "characters", "source"), "source.characters");
  const bytes = count(get(source, "bytes", "source"), "source.bytes");
  if (characters > bytes || bytes > 4n * characters) throw conflict("source.bytes");
  const tools = object(field("tools"), "tools");
  get(tools, "amkv", "tools");
  for (const [name, version] of tools) text(version, `tools.${name}`);
}

function weightsOf(value, path) {
  const weights = object(value, path);
  if (weights.size > LAYERS) throw wrongValue(path);
  for (const [name, numbers] of weights) {
    if (typeof numbers !== "string") throw wrongType(`${path}.${name}`);
    if (!sampled.test(numbers)) throw wrongValue(`${path}.${name}`);
  }
}

function layersOf(described, stored, kind, T) {
  const list = array(described, "model.layers", 1);
  const counts = exactly(stored, "stored", list.length);
  return list.map((value, l) => {
    const path = `model.layers[${l}]`;
    const fields = object(value, path);
    const type = choice(get(fields, "type", path), `${path}.type`, ["full", "sliding"]);
    const size = (name, high) => Number(integer(get(fields, name, path), name, 1n, high));
    const heads = size("kv_heads", 4096n);
    const [keyDim, valueDim] = [size("key_dim", 65536n), size("value_dim", 65536n)];
    let window = get(fields, "window", path);
    if (type === "full" && window !== null) throw conflict(`${path}.window`);
    if (type === "sliding") window = Number(integer(window, `${path}.window`, 1n, TOKENS));
    const t = exactly(counts[l], `stored[${l}]`, heads).map((n) =>
      Number(integer(n, `stored[${l}]`, 0n, BigInt(T))),
    );
    if (type === "sliding") {
      const allowed = [Math.min(T, window - 1), Math.min(T, window)];
      if (new Set(t).size !== 1 || !allowed.includes(t[0])) throw conflict(`stored[${l}]`);
    } else if (kind === "prefill" && t.some((n) => n !== T)) throw conflict(`stored[${l}]`);
    const rows = t.reduce((a, b) => a + b, 0);
    return { type, heads, keyDim, valueDim, window, stored: t, rows, store: "native" };
  });
}

function compaction(root, field, layers) {
  text(get(object(field("method"), "method"), "name", "method"), "method.name");
  const budget = object(field("budget"), "budget");
  text(get(budget, "name", "budget"), "budget.name");
  optional(budget, "file", "budget", fileName);
  optional(budget, "sha256", "budget", hexDigest);
  const requested = object(field("requested"), "requested");
  if (requested.has("ratio") === requested.has("tokens")) throw conflict("requested");
  optional(requested, "ratio", "requested", number);
  optional(requested, "tokens", "requested", (v, p) => integer(v, p, 1n, TOKENS));
  optional(requested, "fidelity", "requested", (v, p) => number(v, p));
  count(field("seed"), "seed");
  const queries = object(field("queries"), "queries");
  text(get(queries, "source", "queries"), "queries.source");
  count(get(queries, "count", "queries"), "queries.count");
  for (const name of ["held_out", "asked"]) optional(queries, name, "queries", count);
  optional(queries, "temperature", "queries", share);
  const perHead = (value, path) => {
    exactly(value, path, layers.length).forEach((heads, l) => {
      if (Array.isArray(heads) && heads.length === 0) return;
      for (const found of exactly(heads, path, layers[l].heads)) share(found, path);
    });
  };
  optional(root, "fit_errors", "", (value, path) => {
    for (const [name, errors] of object(value, path)) perHead(errors, `${path}.${name}`);
  });
  optional(root, "attention", "", perHead);
  optional(root, "fidelity", "", fidelity);
  return number(field("ratio"), "ratio");
}

// Gives every layer its store, and adds the features that stores require.
function storesOf(root, layers, used) {
  const known = (value, path) => {
    if (!["native", "int8", "int4"].includes(text(value, path)) && !PACKED.test(value)) {
      throw wrongValue(path);
    }
    return value;
  };
  const require = (store) => {
    if (store !== "native") used.add(PACKED.test(store) ? "store-packed" : `store-${store}`);
  };
  if (root.get("store") === "mixed") {
    used.add("store-mixed");
    const listed = exactly(get(root, "stores", "manifest"), "stores", layers.length);
    listed.forEach((store, l) => {
      layers[l].store = known(store, `stores[${l}]`);
      require(store);
    });
  } else {
    const store = optional(root, "store", "", known) ?? "native";
    if (root.has("stores")) throw conflict("stores");
    for (const layer of layers) if (layer.type === "full") layer.store = store;
    require(store);
  }
  layers.forEach(({ store, keyDim, valueDim }, l) => {
    const bits = bitsOf(store);
    if (bits === null) return;
    if (keyDim % MULTIPLE[bits.keys] || valueDim % MULTIPLE[bits.values]) {
      throw conflict(`model.layers[${l}]`);
    }
  });
}

function fidelity(value, path) {
  const fields = object(value, path);
  number(get(fields, "asked", path), path);
  share(get(fields, "agreement", path), path);
  integer(get(fields, "tokens", path), path, 1n, TOKENS);
  for (const item of array(get(fields, "probes", path), path)) {
    const probe = object(item, path);
    number(get(probe, "ratio", path), path);
    number(get(probe, "real_ratio", path), path);
    count(get(probe, "stored_bytes", path), path);
    share(get(probe, "agreement", path), path);
  }
}

function statesOf(value) {
  const seen = new Set();
  for (const item of array(value, "states", 1, 16384)) {
    const fields = object(item, "states");
    const layer = integer(get(fields, "layer", "states"), "states.layer", 0n, 4095n);
    const key = `${layer} ${text(get(fields, "name", "states"), "states.name")}`;
    if (seen.has(key)) throw conflict("states");
    seen.add(key);
  }
  return seen.size;
}
