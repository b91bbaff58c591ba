// JSON as section 3 of amkv-v1.md bounds it, and its canonical form (section 4).
//
// Integers become BigInt and all other numbers Number, so that both are told apart and neither is
// rounded. JSON.parse cannot do it: it takes duplicate keys, rounds integers and has no depth.

export const MAX_SEPARATORS = 1048576;
export const MAX_DEPTH = 32;
export const MAX_INTEGER = 9223372036854775807n;
export const MAX_NUMBER_CHARS = 64;

export class Refusal extends Error {
  constructor(code, message) {
    super(`${code}: ${message}`);
    this.code = code;
  }
}

export function parse(text) {
  let separators = 0;
  for (const c of text) if (",:[{".includes(c)) separators++;
  if (separators > MAX_SEPARATORS) throw new Refusal("json-too-large", `${separators} separators`);
  return new Parser(text).whole();
}

const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };

class Parser {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  whole() {
    const value = this.value(0);
    this.space();
    if (this.at < this.text.length) this.invalid("something follows the value");
    return value;
  }

  invalid(what) {
    throw new Refusal("json-invalid", `${what} at character ${this.at}`);
  }

  space() {
    while (" \t\n\r".includes(this.text[this.at] ?? "x")) this.at++;
  }

  // Takes a character if it comes next.
  take(character) {
    this.space();
    if (this.text[this.at] !== character) return false;
    this.at++;
    return true;
  }

  expect(character) {
    if (!this.take(character)) this.invalid(`no ${character}`);
  }

  value(depth) {
    this.space();
    const next = this.text[this.at];
    if (next === "{" || next === "[") {
      if (depth >= MAX_DEPTH) throw new Refusal("json-too-deep", `more than ${MAX_DEPTH} levels`);
      return next === "{" ? this.object(depth + 1) : this.array(depth + 1);
    }
    if (next === '"') return this.string();
    for (const [word, value] of [["true", true], ["false", false], ["null", null]]) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    for (const word of ["NaN", "Infinity", "-Infinity"]) {
      if (this.text.startsWith(word, this.at)) throw new Refusal("json-number", word);
    }
    return this.number();
  }

  object(depth) {
    const found = new Map();
    this.expect("{");
    if (this.take("}")) return found;
    do {
      this.space();
      if (this.text[this.at] !== '"') this.invalid("no key");
      const key = this.string();
      if (found.has(key)) throw new Refusal("json-duplicate-key", key);
      this.expect(":");
      found.set(key, this.value(depth));
    } while (this.take(","));
    this.expect("}");
    return found;
  }

  array(depth) {
    const found = [];
    this.expect("[");
    if (this.take("]")) return found;
    do found.push(this.value(depth));
    while (this.take(","));
    this.expect("]");
    return found;
  }

  number() {
    NUMBER.lastIndex = this.at;
    const match = NUMBER.exec(this.text);
    if (match === null) this.invalid("no value");
    this.at = NUMBER.lastIndex;
    const digits = match[0];
    if (digits.length > MAX_NUMBER_CHARS) throw new Refusal("json-number", "too long");
    if (match[1] === undefined && match[2] === undefined) {
      const value = BigInt(digits);
      if (value > MAX_INTEGER || value < -MAX_INTEGER) throw new Refusal("json-number", digits);
      return value;
    }
    if (!Number.isFinite(Number(digits))) throw new Refusal("json-number", digits);
    return Number(digits);
  }

  string() {
    let found = "";
    this.at++;
    for (;;) {
      const c = this.text[this.at++];
      if (c === undefined || c < " ") this.invalid("a string that does not end");
      if (c === '"') break;
      found += c === "\\" ? this.escape() : c;
    }
    if (/[\x00-\x08\x0b-\x1f\x7f-\x9f]/.test(found)) {
      throw new Refusal("json-string", "a control character");
    }
    if (!found.isWellFormed()) throw new Refusal("json-string", "a lone surrogate");
    return found;
  }

  escape() {
    const c = this.text[this.at++];
    if (c !== "u") return ESCAPES[c] ?? this.invalid("an unknown escape");
    const digits = this.text.slice(this.at, this.at + 4);
    if (!/^[0-9a-fA-F]{4}$/.test(digits)) this.invalid("a wrong escape");
    this.at += 4;
    return String.fromCharCode(parseInt(digits, 16));
  }
}

export function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value instanceof Map) {
    const keys = [...value.keys()].sort(byCodePoint);
    return `{${keys.map((k) => `${quoted(k)}:${canonical(value.get(k))}`).join(",")}}`;
  }
  if (typeof value === "string") return quoted(value);
  return typeof value === "number" ? real(value) : String(value);
}

// JavaScript compares UTF-16, in which characters outside the BMP come before U+E000 to U+FFFF.
export function byCodePoint(a, b) {
  const [x, y] = [[...a], [...b]];
  for (let i = 0; i < Math.min(x.length, y.length); i++) {
    if (x[i] !== y[i]) return x[i].codePointAt(0) - y[i].codePointAt(0);
  }
  return x.length - y.length;
}

function quoted(text) {
  return `"${text.replace(/["\\]/g, "\\$&").replaceAll("\n", "\\n").replaceAll("\t", "\\t")}"`;
}

// The shortest digits are JavaScript's own; where the point and the exponent go is section 4's.
function real(x) {
  const sign = x < 0 || Object.is(x, -0) ? "-" : "";
  if (x === 0) return `${sign}0.0`;
  const [mantissa, exponent] = Math.abs(x).toExponential().split("e");
  const digits = mantissa.replace(".", "");
  const power = Number(exponent);
  if (power >= -4 && power < 16) {
    if (power < 0) return `${sign}0.${"0".repeat(-power - 1)}${digits}`;
    const padded = digits.padEnd(power + 1, "0");
    return `${sign}${padded.slice(0, power + 1)}.${padded.slice(power + 1) || "0"}`;
  }
  const size = String(Math.abs(power)).padStart(2, "0");
  return `${sign}${mantissa}e${power < 0 ? "-" : "+"}${size}`;
}
