// Section 5 of amkv-v1.md: what the bytes of keys and values mean, as 32-bit floats.

import { bitsOf } from "./manifest.mjs";

export const ITEM = { F32: 4, I32: 4, BF16: 2, F16: 2, I8: 1, U8: 1 };
export const GROUP = 64;

// Numbers of a row of `dim` that share a scale: its largest divisor up to `most`.
export function block(dim, most) {
  for (let g = Math.min(dim, most); ; g--) if (dim % g === 0) return g;
}

function numbers(t) {
  const size = ITEM[t.dtype];
  const found = new Float32Array(t.data.length / size);
  const bytes = Buffer.alloc(4);
  for (let i = 0; i < found.length; i++) {
    if (t.dtype === "F16") found[i] = half(t.data.readUInt16LE(2 * i));
    else if (t.dtype === "F32") found[i] = t.data.readFloatLE(4 * i);
    else {
      bytes.writeUInt16LE(t.data.readUInt16LE(2 * i), 2);
      found[i] = bytes.readFloatLE(0);
    }
  }
  return found;
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

export function decoded(layer, tensors, name, dim, part) {
  const t = tensors.get(name);
  const bits = bitsOf(layer.store);
  if (bits === null) return numbers(t);
  const scales = numbers(tensors.get(`${name}.scale`));
  if (!bits.packed) return plain(t, scales, dim, part);
  const codes = unpacked(t.data, dim, bits[part]);
  if (part === "keys") {
    return channels(codes, scales, numbers(tensors.get(`${name}.zero`)), dim, layer.stored);
  }
  const g = block(dim, 64);
  const found = new Float32Array(codes.length);
  for (let i = 0; i < codes.length; i++) {
    found[i] = (2 * codes[i] - (2 ** bits.values - 1)) * scales[Math.floor(i / g)];
  }
  hadamard(found, dim & -dim);
  return found;
}

// int8 and int4
function plain(t, scales, dim, part) {
  const packed = t.dtype === "U8";
  const found = new Float32Array(t.data.length * (packed ? 2 : 1));
  for (let i = 0; i < found.length; i++) {
    const byte = t.data[packed ? i >> 1 : i];
    const code = packed ? (i % 2 ? byte >> 4 : byte & 15) - 8 : (byte << 24) >> 24;
    found[i] = code * scales[Math.floor(i / block(dim, 32))];
  }
  if (packed && part === "keys") hadamard(found, dim & -dim);
  return found;
}

// The planes of a row, byte by byte: each byte holds columns a plane's width apart.
function unpacked(data, dim, bits) {
  const size = (dim * bits) / 8;
  const codes = new Uint8Array(size ? (data.length / size) * dim : 0);
  let [before, shift] = [0, 0];
  for (const p of bits === 3 ? [2, 1] : [bits]) {
    const width = (dim * p) / 8;
    for (let row = 0; row * size < data.length; row++) {
      for (let m = 0; m < width; m++) {
        const byte = data[row * size + before + m];
        for (let j = 0; j < 8 / p; j++) {
          const part = (byte >> (p * j)) & (2 ** p - 1);
          codes[row * dim + m + j * width] |= part << shift;
        }
      }
    }
    before += width;
    shift += p;
  }
  return codes;
}

// Packed keys: a scale and a zero for each column of each group.
function channels(codes, scales, zeros, dim, stored) {
  const found = new Float32Array(codes.length);
  let [row, group] = [0, 0];
  for (const t of stored) {
    for (let first = 0; first < t; first += GROUP, group++) {
      for (let end = row + Math.min(GROUP, t - first); row < end; row++) {
        for (let c = 0; c < dim; c++) {
          const at = group * dim + c;
          found[row * dim + c] = zeros[at] + scales[at] * codes[row * dim + c];
        }
      }
    }
  }
  return found;
}

function hadamard(x, n) {
  const factor = Math.fround(1 / Math.sqrt(n));
  for (let group = 0; group < x.length; group += n) {
    for (let h = 1; h < n; h *= 2) {
      for (let i = 0; i < n; i++) {
        if (i & h) continue;
        const [a, b] = [x[group + i], x[group + i + h]];
        x[group + i] = a + b;
        x[group + i + h] = a - b;
      }
    }
    for (let i = group; i < group + n; i++) x[i] *= factor;
  }
}
