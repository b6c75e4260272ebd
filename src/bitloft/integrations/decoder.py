"""Decoding without a framework in between: one native call for each token of a Llama, Mistral or Qwen2.

A step of transformers at 22 layers costs milliseconds of Python before anything is multiplied, as much as the packed
products themselves. Here prompts are read by transformers, whose keys and values are taken over, and every further
token is one call of ``kernels.cpu_decoder``. What differs from Llama in any way that ``reason`` knows of keeps decoding
through transformers: the alternative, compiling whatever model comes, needs a compiler on the user's machine and a
minute of his time at every start.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.cpu_decoder import SLOTS, NativeDecoder, NativeLayer, Plan, Projection, Segment, caches_of
from bitloft.kernels.cpu_dense import dense_linear, takes
from bitloft.kernels.cpu_linear import multiplies
from bitloft.modules.arrangement import arrange
from bitloft.modules.linear import QuantLinear
from bitloft.modules.multi import AdapterBank

TAKEN = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length of the text
HEAD = "lm_head"
HEAD_ROWS = 32  # of a product of a packed table as the head, where it may not depend on the batch
POSITIONS = 2048  # of the first table of angles; it is doubled when a row comes to its end


def reason(model: nn.Module) -> str | None:
    """Why ``model`` has to decode through transformers, or None where ``Decoder`` takes it."""
    if cpu.library() is None:
        return cpu.explain()
    if type(model) not in TAKEN:
        return f"a {type(model).__name__} is not Llama, Mistral or Qwen2"
    assert_known: Any = model
    return _config_reason(assert_known.config) or _parts_reason(assert_known)


def _config_reason(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"its gate is {config.hidden_act}, not silu"
    rotation = config.rope_parameters["rope_type"]
    if rotation not in ROTATIONS or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its positions are of type {rotation}"
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and window and window < config.max_position_embeddings):
        return "its attention has a window"
    widths = (config.hidden_size, config.intermediate_size, _head_width(config))
    return "16 does not divide its widths" if any(width % 16 for width in widths) else None


def _parts_reason(model: Any) -> str | None:
    for name, module in model.model.layers.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if type(module) is not QuantLinear:
            return f"layers.{name} is a {type(module).__name__}, not packed"
        if module.rotated:
            return f"layers.{name} rotates its inputs"
        if module.weight.device.type != "cpu":
            return f"it lies on {module.weight.device}"
        if module.activations is not None:
            return f"its layers round their input to {module.activations}; the native step is float32"
        if not multiplies(module.format):
            return f"layers.{name} is stored in {module.format}, which is decoded before it is multiplied"
    if model.model.norm.weight.dtype != torch.float32:
        return f"it computes in {model.model.norm.weight.dtype}; the native step is float32"
    return "it is in training mode" if model.training else None


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class Row:
    """One text in progress: its keys [layers, heads, width, slots] and values [layers, heads, slots, width] so far.

    A row owns its memory: rows of different lengths decode together unpadded, and join or leave a batch by being in the
    list or not. Memory doubles when it is full.
    """

    def __init__(
        self,
        keys: Float[Tensor, "layers heads length width"],
        values: Float[Tensor, "layers heads length width"],
        most: int | None = None,
    ) -> None:
        """``most`` is the number of tokens that it will ever hold, where that is known."""
        self.length, self.most = keys.shape[2], most
        slots = slots_for(self.length + 1)
        self.keys = pad(keys.transpose(2, 3), (0, slots - self.length)).contiguous()
        self.values = pad(values, (0, 0, 0, slots - self.length)).contiguous()

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    def make_room(self, tokens: int = 1) -> None:
        """Be able to take so many more."""
        needed = slots_for(self.length + tokens)
        if needed > self.capacity:
            doubled = max(needed, 2 * self.capacity)
            more = (doubled if self.most is None else max(needed, min(doubled, slots_for(self.most)))) - self.capacity
            self.keys = pad(self.keys, (0, more))
            self.values = pad(self.values, (0, 0, 0, more))


def slots_for(tokens: int) -> int:
    """Slots of the cache of a row with so many tokens."""
    return -(-tokens // SLOTS) * SLOTS


class Decoder:
    """``model`` as rows of tokens in, logits out. It describes the model as it is now: make another after a change.

    Brings the model's codes into the order that the kernels read fastest (``modules.arrangement``).

    Raises KernelError where ``reason`` has one.
    """

    def __init__(self, model: PreTrainedModel, bank: AdapterBank | None = None) -> None:
        why = reason(model)
        if why is not None:
            raise KernelError(f"the native decoder cannot take this model: {why}.")
        arrange(model)
        self.model: Any = model
        self.bank = bank or AdapterBank(model)
        self._plan: tuple[Sequence[str | None], Plan, bool] | None = None  # steps ask for the same rows again and again
        body, config = self.model.model, self.model.config
        self._invariant: bool = body.layers[0].self_attn.q_proj.batch_invariant
        self.context: int = config.max_position_embeddings
        self._cache = (config.num_hidden_layers, config.num_key_value_heads, 0, _head_width(config))
        self._native = NativeDecoder(
            [_layer(f"model.layers.{i}", layer) for i, layer in enumerate(body.layers)],
            norm=body.norm.weight.data,
            heads=(config.num_attention_heads, config.num_key_value_heads, _head_width(config)),
            eps=config.rms_norm_eps,
            scale=body.layers[0].self_attn.scaling,
            invariant=self._invariant,
        )
        self.modules = (*self._native.names, HEAD)
        self._roster = self._native.roster(0, 0)
        self._positions(min(POSITIONS, self.context))
        self._head_rows = self._steady()

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None] | None = None
    ) -> tuple[list[Row], Float[Tensor, "rows vocabulary"]]:
        """Read prompts of one token or more, prompt i by the adapter ``names[i]`` of the bank (None: by the base).

        Returns their rows and the logits of the tokens that follow.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with self.bank.rows(names or [None] * len(prompts)):
            out = self.model(**given, use_cache=True, logits_to_keep=1)
        return rows_of(out.past_key_values, mask), out.logits[:, -1]

    @torch.no_grad()
    def step(
        self, rows: Sequence[Row], tokens: Sequence[int], names: Sequence[str | None] | None = None
    ) -> Float[Tensor, "rows vocabulary"]:
        """Append a token to each row; returns the logits of the next ones. Raises KernelError beyond the context."""
        names = names or [None] * len(rows)
        for row in rows:
            row.make_room()
        self._know_positions(max(row.length for row in rows) + 1)
        hidden = self.model.model.embed_tokens(torch.tensor(tokens))
        caches = [(row.keys, row.values, row.length) for row in rows]
        plan, touched = self._plan_of(names)
        self._native.step(hidden, caches, plan)
        for row in rows:
            row.length += 1
        return self._head(hidden, names if touched else None)

    def row(self, most: int) -> Row:
        """A row without a token, for ``most`` of them."""
        return Row(torch.empty(self._cache), torch.empty(self._cache), most)

    def bytes_for(self, tokens: int) -> int:
        """What the keys and values of a row with so many tokens take."""
        layers, heads, _, width = self._cache
        return 8 * int(layers) * int(heads) * width * slots_for(tokens)

    @torch.no_grad()
    def read(
        self, pieces: Sequence[tuple[Row, Sequence[int]]], names: Sequence[str | None]
    ) -> Float[Tensor, "pieces vocabulary"]:
        """Append some tokens to each row, new rows and old ones in one step; returns the logits behind each last one.

        Raises KernelError beyond the context; then no row has changed.
        """
        # Pieces of one adapter lie side by side, those of the base are the last.
        order = sorted(range(len(pieces)), key=lambda i: (names[i] is None, names[i] or ""))
        pieces, given, names = [pieces[i] for i in order], names, [names[i] for i in order]
        counts = [len(tokens) for _, tokens in pieces]
        for (row, _), count in zip(pieces, counts, strict=True):
            row.make_room(count)
        self._know_positions(max(row.length + count for (row, _), count in zip(pieces, counts, strict=True)))
        tables, owned = self._tables(names, counts)
        total = sum(counts)
        if len(tables) > self._roster.segments or total > self._roster.rows:
            self._roster = self._native.roster(
                max(len(tables), 2 * self._roster.segments), max(total, 2 * self._roster.rows)
            )
        hidden = self.model.model.embed_tokens(torch.tensor([token for _, tokens in pieces for token in tokens]))
        self._native.run(hidden, caches_of([(row, count) for (row, _), count in zip(pieces, counts, strict=True)]),
                         self._roster.fill(tables, owned, total))  # fmt: skip
        for (row, _), count in zip(pieces, counts, strict=True):
            row.length += count
        last = torch.empty(len(pieces), hidden.shape[1])
        last[torch.tensor(order)] = hidden[torch.tensor(counts).cumsum(0) - 1]
        touched = any(int(one.table[-1, 0]) for one in self._in_use)
        return self._head(last, given if touched else None)

    def _tables(self, names: Sequence[str | None], counts: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """The description of each adapter and the number of its tokens, in order."""
        owned: dict[str, int] = {}
        for name, count in zip(names, counts, strict=True):
            if name is not None:
                owned[name] = owned.get(name, 0) + count
        found = [self.bank.described(name, self.modules) for name in owned]
        uncovered = next((name for name, one in zip(owned, found, strict=True) if not one.covers), None)
        if uncovered is not None:
            raise KernelError(f"adapter {uncovered} touches modules that the native decoder does not run.")
        self._in_use = found  # what the addresses point at, for as long as the step takes
        return [one.table for one in found], list(owned.values())

    def _head(
        self, hidden: Float[Tensor, "rows width"], names: Sequence[str | None] | None
    ) -> Float[Tensor, "rows vocabulary"]:
        """The head's product; ``names`` where an adapter touches it: its deltas then follow the rows of the call."""
        head = self.model.lm_head
        plain = type(head) is nn.Linear and head.bias is None and takes(head.weight)
        if names is None:
            return dense_linear(hidden, head.weight.data) if plain else self._logits(hidden)
        with self.bank.rows(names):
            logits: Tensor = (
                self.bank.added(HEAD, hidden, dense_linear(hidden, head.weight.data)) if plain else head(hidden)
            )
        return logits

    def _logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        """The product of a packed head. So that it gives a row the same bits whatever lies beside it where
        ``batch_invariant`` asks for that, a table always sees the same number of rows, or one at a time where
        ``_steady`` finds that this does not help."""
        head = self.model.lm_head
        if not self._invariant or isinstance(head, QuantLinear):
            found: Tensor = head(hidden)
            return found
        blocks = hidden.split(self._head_rows)
        return torch.cat([head(pad(block, (0, 0, 0, self._head_rows - len(block))))[: len(block)] for block in blocks])

    @torch.no_grad()
    def _steady(self) -> int:
        """Rows of the products of a packed table: HEAD_ROWS, if a row then gets the same bits wherever it lies, else
        one."""
        head = self.model.lm_head
        if not self._invariant or isinstance(head, QuantLinear):
            return 1
        x = torch.randn(HEAD_ROWS, head.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        straight, turned = head(x), head(x.flip(0)).flip(0)
        return HEAD_ROWS if torch.equal(straight, turned) else 1

    def _know_positions(self, most: int) -> None:
        if most > self._native.positions:
            self._positions(min(max(most, 2 * self._native.positions), self.context))

    def _plan_of(self, names: Sequence[str | None]) -> tuple[Plan, bool]:
        """The plan of a step of these rows, and whether one of their adapters touches the head."""
        if self._plan is None or self._plan[0] != names:
            found = list(self.bank.segments(names))
            plan = self._native.plan(len(names), [Segment(rows, views.native) for views, rows in found])
            self._plan = names, plan, any(HEAD in views.blocks for views, _ in found)
        return self._plan[1:]

    def _positions(self, count: int) -> None:
        """Tables of the angles of positions 0 .. count - 1."""
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), torch.arange(count)[None])
        self._native.rotate(cos[0].contiguous(), sin[0].contiguous())


@torch.no_grad()
def rows_of(cache: Any, mask: Int[Tensor, "rows slots"]) -> list[Row]:
    """The rows of a transformers cache that was filled from the left-padded ``mask``."""
    keys, values = ([layer[i] for layer in cache] for i in (0, 1))
    lengths = mask.sum(1).tolist()
    return [
        Row(torch.stack([k[i, :, -n:] for k in keys]), torch.stack([v[i, :, -n:] for v in values]))
        for i, n in enumerate(lengths)
    ]


def _layer(name: str, layer: Any) -> NativeLayer:
    def projections(part: str, *linears: str) -> list[Projection]:
        parent = getattr(layer, part)
        return [_projection(f"{name}.{part}.{linear}", getattr(parent, linear)) for linear in linears]

    return NativeLayer(
        layer.input_layernorm.weight.data,
        layer.post_attention_layernorm.weight.data,
        attention=projections("self_attn", "q_proj", "k_proj", "v_proj"),
        output=projections("self_attn", "o_proj"),
        gates=projections("mlp", "gate_proj", "up_proj"),
        down=projections("mlp", "down_proj"),
    )


def _projection(name: str, linear: QuantLinear) -> Projection:
    start = linear.packed_start() if linear.start_enabled else None
    bias = None if linear.bias is None else linear.bias.data
    return Projection(name, linear.operand(), bias, start, linear.scaling)
