"""The manifest: which fields it has, of which types, and which contradict each other.

The table in `amkv-v1.md` is normative; the functions below follow its order. Fields not named here
are allowed and ignored, so that minor versions can add some.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Final

from amkv_format import limits
from amkv_format.errors import Code, FormatError
from amkv_format.fields import Fields, choice, integer, items, number
from amkv_format.jsontext import canonical_json
from amkv_format.stores import MIXED, NATIVE, STORE_MIXED, STORE_PACKED, STORES, row_multiple

FORMAT: Final = "amkv"
VERSION: Final = "1.4"
"""The version that this package knows. A file states the first that has all it uses."""

MANIFEST_HASH: Final = "manifest_hash"
"""The field with the hash of all others; files of version 1.3 and later have it."""

STATES: Final = "states"
"""The field that lists states, and the feature that it requires."""

FEATURES: Final[Mapping[str, int]] = {
    "store-int8": 1,
    "store-int4": 1,
    STATES: 2,
    STORE_PACKED: 4,
    STORE_MIXED: 4,
}
"""What `features_required` may name, each with the minor version that it came with."""

_OLDEST_WRITTEN: Final = 3  # the first with a hash of the manifest

KINDS: Final = ("prefill", "compact")
LAYER_TYPES: Final = ("full", "sliding")
MODEL_DTYPES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that a model may compute in, and the bytes per number."""

BOUNDARIES: Final = ("raw", "in_user_turn", "turn_closed")

WEIGHTS: Final = "weights"
"""The field of `model` with numbers out of its weights."""

_SINCE_1_4: Final = (("model", "config"), ("model", WEIGHTS), ("tokenizer", "turns_hash"))
"""Optional fields that say more of what a file belongs to, since version 1.4."""

_NUMBERS: Final = re.compile("([0-9a-f]{8}){1,1024}")

_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,4})\.(0|[1-9][0-9]{0,4})")
_UTC: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", re.ASCII)


@dataclass(frozen=True)
class Layer:
    """One layer as the manifest describes it; `stored[h]` entries of KV head `h` are in the file.

    type    "full" or "sliding"
    window  number of keys that a query of a sliding layer sees, its own included; None if full
    store   how its entries are stored: a key of STORES
    """

    type: str
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    stored: tuple[int, ...]
    store: str = NATIVE

    @property
    def rows(self) -> int:
        """Rows of the layer's flat tensors: the sum of `stored`."""
        return sum(self.stored)


@dataclass(frozen=True)
class Outline:
    """What a checked manifest says about the tensors of its file.

    store        how the entries of full layers are stored: a key of STORES; MIXED: as each says
    model_bytes  bytes per number in the model's dtype
    states       number of states, of layers that keep a state instead of keys and values
    manifest_hash  as the manifest states it; None in files older than version 1.3
    """

    kind: str
    store: str
    model_bytes: int
    logical_length: int
    layers: tuple[Layer, ...]
    ratio: float | None
    payload_hash: str
    states: int = 0
    manifest_hash: str | None = None


def check_manifest(manifest: object) -> Outline:
    """Checks every field that this version defines.

    Raises FormatError: `format-unknown`, `version-unsupported`, `feature-unsupported`, or one
    of the `field-` codes.
    """
    root = Fields(manifest)
    minor = _check_identity(root)
    kind = root.choice("kind", KINDS)
    _check_created(root)
    length = root.integer("logical_length", 1, limits.MAX_TOKENS)
    _check_origin(root, length)
    layers = _layers(root, kind, length)
    if kind == "compact":
        _check_compaction(root, layers)
    tools = root.object("tools")
    tools.text("amkv")
    for name in tools.keys():  # noqa: SIM118 - Fields is no mapping
        tools.text(name)
    ratio = root.number("ratio") if kind == "compact" else None
    store, layers = _stores(root, kind, layers)
    states = _states(root)
    names = {layer.store for layer in layers} if store == MIXED else {store}
    _check_features(root, _features(store, names, bool(states)))
    number_bytes = MODEL_DTYPES[root.object("model").text("dtype")]
    hash_ = root.sha256("payload_hash")
    # A later version cannot be passed off as an earlier one: its hash would not match.
    own = root.sha256(MANIFEST_HASH) if minor >= 3 or MANIFEST_HASH in root else None
    return Outline(kind, store, number_bytes, length, layers, ratio, hash_, states, own)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """`sha256:…` of the canonical manifest without the field that holds this hash."""
    rest = {name: value for name, value in manifest.items() if name != MANIFEST_HASH}
    return (
        "sha256:"
        + hashlib.sha256(canonical_json(rest).encode("utf-8", "surrogatepass")).hexdigest()
    )


def _check_identity(root: Fields) -> int:
    """Checked first, so that a file of a later version is refused as such; the minor version."""
    if root.raw("format") != FORMAT:
        raise FormatError(Code.FORMAT, f"format is {str(root.raw('format'))[:80]!r}")
    version = _VERSION.fullmatch(text := root.text("version"))
    if version is None:
        raise FormatError(Code.FIELD_VALUE, f"version is {text[:80]!r}, not major.minor")
    if version[1] != VERSION.partition(".")[0]:
        raise FormatError(Code.VERSION, f"version is {text}, this reader knows {VERSION}")
    for feature in root.array("features_required"):
        if not isinstance(feature, str):
            raise FormatError(Code.FIELD_TYPE, "features_required holds something but strings")
        if feature not in FEATURES:
            # A file states the first version that has all it uses: that is the one to look for.
            raise FormatError(
                Code.FEATURE,
                f"the file needs the feature {feature[:80]!r} and states amkv format {text}, "
                f"this reader knows {VERSION}",
            )
    return int(version[2])


def _check_created(root: Fields) -> None:
    text = root.text("created")
    try:
        # fromisoformat accepts forms not in RFC 3339; the pattern accepts 31 February.
        valid = _UTC.fullmatch(text) and datetime.fromisoformat(text[:19])
    except ValueError:
        valid = None
    if not valid:
        raise FormatError(
            Code.FIELD_VALUE, f"created is {text!r}, not a time such as 2026-01-31T23:59:59Z"
        )


def _check_origin(root: Fields, length: int) -> None:
    """Checks model, tokenizer, source text, and where the document is among the tokens."""
    model = root.object("model")
    model.text("id")
    model.text_or_null("revision")
    model.text("architecture")
    model.sha256("config_hash")
    model.choice("dtype", MODEL_DTYPES)
    model.object("rope")
    if "config" in model:
        model.object("config")
    if WEIGHTS in model:
        _check_weights(model.object(WEIGHTS))

    tokenizer = root.object("tokenizer")
    tokenizer.sha256("hash")
    if tokenizer.raw("template_hash") is not None:
        tokenizer.sha256("template_hash")
    if "turns_hash" in tokenizer:
        tokenizer.sha256("turns_hash")

    source = root.object("source")
    source.bare_name("name")
    source.sha256("sha256", prefix="")
    characters = source.integer("characters", 0, limits.MAX_INTEGER)
    size = source.integer("bytes", 0, limits.MAX_INTEGER)
    if not characters <= size <= 4 * characters:
        raise FormatError(
            Code.FIELD_CONFLICT, f"{characters} characters cannot take {size} bytes in UTF-8"
        )

    start = root.integer("document_start", 0, limits.MAX_TOKENS)
    end = root.integer("document_end", 0, limits.MAX_TOKENS)
    if not start <= end <= length:
        raise FormatError(
            Code.FIELD_CONFLICT, f"the document is tokens {start} to {end} of {length}"
        )
    root.choice("boundary", BOUNDARIES)


def _check_weights(weights: Fields) -> None:
    """Checks for numbers of 8 hexadecimal digits each, by the name of what they are from."""
    if len(weights.keys()) > limits.MAX_LAYERS:
        raise FormatError(
            Code.FIELD_VALUE,
            f"model.{WEIGHTS} has {len(weights.keys())} fields, not 0 to {limits.MAX_LAYERS}",
        )
    for name in weights.keys():  # noqa: SIM118 - Fields is no mapping
        found = weights.raw(name)
        if not isinstance(found, str) or not _NUMBERS.fullmatch(found):
            raise FormatError(
                Code.FIELD_VALUE if isinstance(found, str) else Code.FIELD_TYPE,
                f"{weights.path(name[:80])} is not 1 to 1024 numbers of 8 lowercase hex digits",
            )


def _layers(root: Fields, kind: str, length: int) -> tuple[Layer, ...]:
    described = root.object("model").array("layers", 1, limits.MAX_LAYERS)
    stored = items(root.raw("stored"), "stored", len(described))
    return tuple(
        _layer(Fields(value, f"model.layers[{i}]"), stored[i], f"stored[{i}]", kind, length)
        for i, value in enumerate(described)
    )


def _layer(fields: Fields, stored: object, path: str, kind: str, length: int) -> Layer:
    kv_heads = fields.integer("kv_heads", 1, limits.MAX_HEADS)
    full = fields.choice("type", LAYER_TYPES) == "full"
    if full and fields.raw("window") is not None:
        raise FormatError(Code.FIELD_CONFLICT, f"{fields.path('window')} of a full layer not null")
    layer = Layer(
        type="full" if full else "sliding",
        kv_heads=kv_heads,
        key_dim=fields.integer("key_dim", 1, limits.MAX_HEAD_DIM),
        value_dim=fields.integer("value_dim", 1, limits.MAX_HEAD_DIM),
        window=None if full else fields.integer("window", 1, limits.MAX_TOKENS),
        stored=tuple(integer(t, path, 0, length) for t in items(stored, path, kv_heads)),
    )
    _check_stored(layer, path, kind, length)
    return layer


def _check_stored(layer: Layer, path: str, kind: str, length: int) -> None:
    counts = set(layer.stored)
    if layer.window is not None:
        low, high = min(length, layer.window - 1), min(length, layer.window)
        if len(counts) != 1 or not low <= layer.stored[0] <= high:
            raise FormatError(
                Code.FIELD_CONFLICT,
                f"{path}: every head of this sliding layer stores its last {low} or {high} tokens",
            )
    elif kind == "prefill" and counts != {length}:
        raise FormatError(
            Code.FIELD_CONFLICT, f"{path}: every head of a prefill stores all {length} tokens"
        )


def _check_compaction(root: Fields, layers: tuple[Layer, ...]) -> None:
    root.object("method").text("name")
    _check_budget(root.object("budget"))
    requested = root.object("requested")
    if ("ratio" in requested) == ("tokens" in requested):
        raise FormatError(Code.FIELD_CONFLICT, "requested holds either ratio or tokens")
    if "ratio" in requested:
        requested.number("ratio")
    else:
        requested.integer("tokens", 1, limits.MAX_TOKENS)
    if "fidelity" in requested:
        requested.number("fidelity")
    root.integer("seed", 0, limits.MAX_INTEGER)
    _check_queries(root.object("queries"))
    if "fit_errors" in root:
        errors = root.object("fit_errors")
        for name in errors.keys():  # noqa: SIM118 - Fields is no mapping
            _check_per_head(errors.raw(name), errors.path(name[:80]), layers)
    if "attention" in root:
        _check_per_head(root.raw("attention"), "attention", layers)
    if "fidelity" in root:
        _check_fidelity(root.object("fidelity"))


def _check_budget(budget: Fields) -> None:
    budget.text("name")
    if "file" in budget:
        budget.bare_name("file")
    if "sha256" in budget:
        budget.sha256("sha256", prefix="")


def _check_queries(queries: Fields) -> None:
    queries.text("source")
    queries.integer("count", 0, limits.MAX_INTEGER)
    for name in ("held_out", "asked"):
        if name in queries:
            queries.integer(name, 0, limits.MAX_INTEGER)
    if "temperature" in queries:
        queries.number("temperature", zero=True)


def _check_per_head(value: object, path: str, layers: tuple[Layer, ...]) -> None:
    """Checks for one list per layer: empty, or one number, not below 0, for each KV head."""
    for i, heads in enumerate(items(value, path, len(layers))):
        if heads == []:
            continue
        for found in items(heads, f"{path}[{i}]", layers[i].kv_heads):
            number(found, f"{path}[{i}]", zero=True)


def _check_fidelity(fidelity: Fields) -> None:
    fidelity.number("asked")
    fidelity.number("agreement", zero=True)
    fidelity.integer("tokens", 1, limits.MAX_TOKENS)
    for i, value in enumerate(fidelity.array("probes")):
        probe = Fields(value, f"{fidelity.path('probes')}[{i}]")
        probe.number("ratio")
        probe.number("real_ratio")
        probe.integer("stored_bytes", 0, limits.MAX_INTEGER)
        probe.number("agreement", zero=True)


def _stores(root: Fields, kind: str, layers: tuple[Layer, ...]) -> tuple[str, tuple[Layer, ...]]:
    """What `store` says, and the layers with the store of each."""
    if kind != "compact":
        return NATIVE, layers
    store = root.choice("store", (*STORES, MIXED)) if "store" in root else NATIVE
    if store == MIXED:
        names = items(root.raw("stores"), "stores", len(layers))
        stores = [choice(name, f"stores[{i}]", STORES) for i, name in enumerate(names)]
    elif "stores" in root:
        raise FormatError(Code.FIELD_CONFLICT, f"stores is there, but store is {store}")
    else:
        stores = [store if layer.type == "full" else NATIVE for layer in layers]
    for i, (layer, name) in enumerate(zip(layers, stores, strict=True)):
        for part, dim in (("keys", layer.key_dim), ("values", layer.value_dim)):
            if dim % (multiple := row_multiple(name, part)):
                raise FormatError(
                    Code.FIELD_CONFLICT,
                    f"model.layers[{i}] has {part} of {dim} numbers, "
                    f"{name} takes multiples of {multiple}",
                )
    return store, tuple(replace(x, store=name) for x, name in zip(layers, stores, strict=True))


def _states(root: Fields) -> int:
    """How many states are stored; checks that each belongs to a layer and none appears twice."""
    if STATES not in root:
        return 0
    seen: set[tuple[int, str]] = set()
    for i, value in enumerate(root.array(STATES, 1, limits.MAX_STATES)):
        fields = Fields(value, f"{STATES}[{i}]")
        state = fields.integer("layer", 0, limits.MAX_LAYERS - 1), fields.text("name")
        if state in seen:
            raise FormatError(Code.FIELD_CONFLICT, f"{STATES}[{i}] is there twice")
        seen.add(state)
    return len(seen)


def _features(store: str, names: Iterable[str], states: bool) -> set[str]:
    """The features that a file uses. names  the stores of its layers"""
    used = {feature for name in names if (feature := STORES.get(name))}
    return used | ({STORE_MIXED} if store == MIXED else set()) | ({STATES} if states else set())


def _check_features(root: Fields, wanted: set[str]) -> None:
    """A feature must be required exactly when it is used."""
    required = set(root.array("features_required"))
    if required != wanted:
        raise FormatError(
            Code.FIELD_CONFLICT,
            f"features_required is {', '.join(sorted(required)) or 'empty'}, "
            f"the file uses {', '.join(sorted(wanted)) or 'none'}",
        )


def manifest_schema() -> dict[str, Any]:
    """The manifest's JSON Schema (2020-12), for validators and editors; `check_manifest` is
    stricter, since a schema cannot compare two fields."""
    text = files(__package__).joinpath("manifest.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def complete(manifest: Mapping[str, Any], payload_hash: str, ratio: float | None) -> dict[str, Any]:
    """A copy of `manifest` with what a writer knows better than its caller.

    `format`, `version` (the first that has all the file uses, so that older readers take what they
    can) and the hashes are set; `features_required`, `created` and, when given, `ratio` are filled
    in if absent.
    """
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    store = str(manifest.get("store", NATIVE))
    listed = manifest.get("stores")
    names = map(str, listed) if store == MIXED and isinstance(listed, list | tuple) else [store]
    used = _features(store, names, STATES in manifest)
    told = any(field in manifest.get(part, ()) for part, field in _SINCE_1_4)
    minor = max([4 if told else _OLDEST_WRITTEN, *(FEATURES[feature] for feature in used)])
    defaults: dict[str, Any] = {
        "features_required": [feature for feature in FEATURES if feature in used],
        "created": now,
    }
    if ratio is not None:
        defaults["ratio"] = ratio
    fixed = {"format": FORMAT, "version": f"1.{minor}", "payload_hash": payload_hash}
    whole = {**defaults, **manifest, **fixed}
    return whole | {MANIFEST_HASH: manifest_hash(whole)}
