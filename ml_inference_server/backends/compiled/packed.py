"""A model without padding: all texts of a batch lie one behind the other in one row of tokens.

Matrix products, normalisation and activation do not care where a text ends; attention does, and reads it in `starts`.
So no work is spent on padding, and one graph, dynamic in its sizes, serves every mix of lengths. `compiled` runs this
through torch.compile.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ml_inference_server.backends.base import Company, TokenBatch, packed_size
from ml_inference_server.backends.compiled.native import load_operators
from ml_inference_server.backends.model.loading import LoadedModel
from ml_inference_server.utils.errors import ModelError

_ATTENTION = "packed"
Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model counts the positions of a text's tokens: from `first` on, each, or each that is not `skipped`.

    RoBERTa and its kin begin behind their padding id, and give that same position to a padding token, also to one that
    a text holds literally.
    """

    first: int = 0
    skipped: int | None = None

    def of(self, ids: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """(tokens,): of texts one behind the other, which begin at `starts` and end with the last of it."""
        lengths = np.diff(starts)
        if self.skipped is None:
            return np.arange(len(ids)) - np.repeat(starts[:-1], lengths) + self.first
        counted = ids != self.skipped
        before = np.concatenate([[0], counted.cumsum()])
        places: NDArray[np.int64] = (before[1:] - np.repeat(before[starts[:-1]], lengths)) * counted + (self.first - 1)
        return places


def pack(batch: TokenBatch, positions: Positions, *, pads: bool) -> Inputs:
    """(ids (1, tokens), positions (1, tokens), segment ids (1, tokens), starts (texts + 1)), all int64.

    The row is filled up to `packed_size` with tokens that belong to no text. With `pads` two more follow, of
    (texts, longest): where in the row each place of a padded batch is found (anywhere for padding), and its mask.
    """
    ids, starts, types = batch.ids, batch.starts, batch.type_ids
    if len(batch) == 1:
        # A size of 1 would be compiled into the graph as a constant: a second text, of two tokens, keeps it dynamic.
        more = np.zeros(2, np.int32)
        ids, starts = np.append(ids, more), np.append(starts, starts[-1] + 2)
        types = None if types is None else np.append(types, more)
    row = np.zeros((3, packed_size(len(ids))), np.int64)
    row[0, : len(ids)] = ids
    row[1] = positions.first
    row[1, : len(ids)] = positions.of(row[0, : len(ids)], starts)
    if types is not None:
        row[2, : len(ids)] = types
    inputs = [row[:1], row[1:2], row[2:], starts]
    if pads:
        lengths = np.diff(starts)
        places = np.arange(max(2, int(lengths.max())))  # two, for the same reason as above
        kept = places < lengths[:, None]
        inputs += [np.where(kept, starts[:-1, None] + places, 0), kept.astype(np.int64)]
    return tuple(torch.from_numpy(each) for each in inputs)


class PackedModule(torch.nn.Module):
    """`LoadedModel.module` on packed tokens: forward(*inputs(batch)) -> (texts, dimension), as the padded one gives.

    Takes the loaded model over: afterwards it can only be run packed. ModelError if its architecture cannot be.
    """

    def __init__(self, loaded: LoadedModel, *, int8: bool = False) -> None:
        """int8: the matrices of the encoder's layers become INT8; ModelError where they cannot."""
        super().__init__()
        encoder = loaded.base.base_model
        uses_amx = load_operators()
        self.quantized_layers = 0
        if int8:
            self.quantized_layers = _use_int8_layers(encoder)
            self.attention = f"INT8 layers ({torch.ops.mlis.int8_instructions()})"
        else:
            # The condition of packed_attention.cpp: the label must say what runs.
            dim = encoder.config.hidden_size // encoder.config.num_attention_heads
            uses_amx = uses_amx and encoder.dtype == torch.bfloat16 and dim % 32 == 0
            own = uses_amx and _use_own_layers(encoder)
            self.attention = "AMX layers" if own else "AMX attention" if uses_amx else "attention text by text"
        self._positions = _positions(encoder)
        self._takes_segments = loaded.takes_token_type_ids
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
        encoder.config._attn_implementation = _ATTENTION  # noqa: SLF001
        self._hidden = _Unpacked(encoder)
        self._is_embedding = loaded.task == "embedding"
        self._truncate_dim = loaded.module.truncate_dim
        if self._is_embedding:
            self._after = torch.nn.ModuleList(list(loaded.module.model)[1:])
            if getattr(self._after[0], "pooling_mode", None) in ("mean", ("mean",)):
                self._after[0] = PackedMean()
                self._hidden.pads = False
        else:
            self._classifier: Any = loaded.base
            setattr(loaded.base, str(loaded.base.base_model_prefix), self._hidden)

    def inputs(self, batch: TokenBatch) -> Inputs:
        """What `forward` takes."""
        return pack(batch, self._positions, pads=self._hidden.pads)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor,
        starts: torch.Tensor,
        gather: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packed: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "starts": starts, "gather": gather}
        if self._takes_segments:
            packed["token_type_ids"] = segments
        if not self._is_embedding:
            logits: torch.Tensor = self._classifier(**packed).logits.float()
            return logits
        # Pooling and what follows stay in FP32, as in the padded model.
        hidden = self._hidden(**packed).last_hidden_state.float()
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask, "starts": starts}
        for module in self._after:
            features = module(features)
        rows: torch.Tensor = features["sentence_embedding"]
        return rows if self._truncate_dim is None else rows[:, : self._truncate_dim]


# Layers whose computation native/encoder_layer.cpp holds, as transformers names them.
_BERT_LAYERS = {"BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"}


class EncoderLayer(torch.nn.Module):
    """A layer of BERT or its kin in BF16 as one operator of our own, in place of transformers' module."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, joined = layer.attention.self, layer.attention.output
        self.heads = int(attention.num_attention_heads)
        self.eps = float(joined.LayerNorm.eps)
        matrices = [attention.query, attention.key, attention.value, joined.dense]
        matrices += [layer.intermediate.dense, layer.output.dense]
        norms = [joined.LayerNorm, layer.output.LayerNorm]
        self.matrices = torch.nn.ParameterList([_fixed(_tiles(each.weight)) for each in matrices])
        self.biases = torch.nn.ParameterList([_fixed(each.bias.detach().float()) for each in matrices])
        self.norms = torch.nn.ParameterList([_fixed(p.detach().float()) for n in norms for p in (n.weight, n.bias)])

    def forward(
        self, hidden_states: torch.Tensor, *_: Any, packed_starts: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mlis.encoder_layer(
            hidden_states[0], packed_starts, list(self.matrices), list(self.biases), list(self.norms), self.heads,
            self.eps,
        )  # fmt: skip
        return out.unsqueeze(0)


def _tiles(weight: torch.Tensor) -> torch.Tensor:
    """As native/linear.h reads it: by 32 outputs, 32 inputs, 16 outputs, pair of inputs, output, one of the pair."""
    outputs, inputs = weight.shape
    tiles = weight.detach().to(torch.bfloat16).view(outputs // 32, 2, 16, inputs // 32, 16, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def _fixed(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


class Int8Layer(torch.nn.Module):
    """A layer of BERT or its kin with INT8 matrices as one operator of our own, in place of transformers' module."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, joined = layer.attention.self, layer.attention.output
        self.heads = int(attention.num_attention_heads)
        self.eps = float(joined.LayerNorm.eps)
        read = (attention.query, attention.key, attention.value)
        weights = [torch.cat([each.weight.detach().float() for each in read])]
        biases = [torch.cat([each.bias.detach().float() for each in read])]
        for linear in (joined.dense, layer.intermediate.dense, layer.output.dense):
            weights.append(linear.weight.detach().float())
            biases.append(linear.bias.detach().float())
        # Symmetric, a scale for each output: its largest weight becomes 127.
        scales = [weight.abs().amax(dim=1).clamp_min(1e-30) / 127 for weight in weights]
        values = [
            (weight / scale[:, None]).round().to(torch.int8) for weight, scale in zip(weights, scales, strict=True)
        ]
        norms = [joined.LayerNorm, layer.output.LayerNorm]
        self.matrices = torch.nn.ParameterList([_fixed(_panels(each)) for each in values])
        self.scales = torch.nn.ParameterList([_fixed(each) for each in scales])
        self.sums = torch.nn.ParameterList([_fixed(each.sum(dim=1, dtype=torch.int32)) for each in values])
        self.biases = torch.nn.ParameterList([_fixed(each) for each in biases])
        self.norms = torch.nn.ParameterList([_fixed(p.detach().float()) for n in norms for p in (n.weight, n.bias)])

    def forward(
        self, hidden_states: torch.Tensor, *_: Any, packed_starts: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mlis.int8_layer(
            hidden_states[0], packed_starts, list(self.matrices), list(self.scales), list(self.sums),
            list(self.biases), list(self.norms), self.heads, self.eps,
        )  # fmt: skip
        return out.unsqueeze(0)


# Matrices of a layer that become INT8: query, key, value, output, first, second.
_MATRICES_OF_A_LAYER = 6


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """As native/int8_linear.h reads it: by panel of outputs, some inputs, output, one of the inputs."""
    outputs, inputs = weight.shape
    panel, together = torch.ops.mlis.int8_panel()
    return weight.view(outputs // panel, panel, inputs // together, together).permute(0, 2, 1, 3).contiguous()


def _use_int8_layers(base: Any) -> int:
    """Put an Int8Layer in the place of each layer; how many matrices are INT8 now. ModelError if that cannot be."""
    if not torch.ops.mlis.int8_instructions():
        raise ModelError(
            "INT8 without padding needs AVX2 or ARM's dot products, and the operators were built without: "
            "set model.compile: false"
        )
    layers = _bert_layers(base)
    config = base.config
    sizes = (config.hidden_size, getattr(config, "intermediate_size", 0))
    if not layers or any(size % 64 for size in sizes) or config.hidden_size % (32 * config.num_attention_heads):
        raise ModelError(
            f"INT8 without padding runs layers of BERT and its kin whose sizes are multiples of 64 (heads: of 32), and "
            f"{type(base).__name__} has none: set model.compile: false, or model.quantization: bf16"
        )
    base.encoder.layer = torch.nn.ModuleList([Int8Layer(layer) for layer in layers])
    return _MATRICES_OF_A_LAYER * len(layers)


def _bert_layers(base: Any) -> list[Any]:
    """All layers, where each is BERT's; else none."""
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    return list(layers) if layers and all(is_bert_layer(layer) for layer in layers) else []


def _use_own_layers(base: Any) -> bool:
    """Put an EncoderLayer in the place of each layer, where the architecture is BERT's and all sizes allow it."""
    layers = _bert_layers(base)
    if layers:
        base.encoder.layer = torch.nn.ModuleList([EncoderLayer(layer) for layer in layers])
    return bool(layers)


def is_bert_layer(layer: Any) -> bool:
    if type(layer).__name__ not in _BERT_LAYERS or layer.is_decoder:
        return False
    activation = layer.intermediate.intermediate_act_fn
    exact_gelu = isinstance(activation, GELUActivation) and activation.act is torch.nn.functional.gelu
    return exact_gelu and all(size % 32 == 0 for size in layer.intermediate.dense.weight.shape)


class PackedMean(torch.nn.Module):
    """The mean of each text's tokens; sentence-transformers' Pooling does the same with padded rows, in more time."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens = features["token_embeddings"]
        places = torch.arange(tokens.shape[0], device=tokens.device)
        # The last bag is what fills the row up. With include_last_offset it would be counted to the last text.
        means = torch.nn.functional.embedding_bag(places, tokens, features["starts"], mode="mean")[:-1]
        return {**features, "sentence_embedding": means}


class _Unpacked(torch.nn.Module):
    """Runs the base model on packed tokens and gives its hidden states padded, (texts, longest, width).

    Without `pads` it gives them as they are, (tokens, width), and needs no `gather`.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self._base = base
        self.pads = True

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        starts: torch.Tensor,
        gather: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self._base(input_ids=input_ids, position_ids=position_ids, packed_starts=starts, **segments)
        hidden = out.last_hidden_state[0]
        if not self.pads:
            return BaseModelOutputWithPooling(hidden)
        hidden = hidden[gather]
        pooler = getattr(self._base, "pooler", None)
        return BaseModelOutputWithPooling(hidden, None if pooler is None else pooler(hidden))


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packed_starts: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer; query, key, value: (1, heads, tokens, dim)."""
    if options.get("sliding_window") is not None or options.get("softcap") is not None:
        raise ModelError("this model's attention has a window or a cap, which packed attention does not know")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # several heads of the query share one of the key
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    rows = [each[0].transpose(0, 1).contiguous() for each in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", False))
    out = torch.ops.mlis.packed_attention(*rows, packed_starts, scale, causal)
    return out.unsqueeze(0), None


def check_fit(loaded: LoadedModel) -> None:
    """ModelError, with the reason, unless all of the model can run without padding."""
    reason = _unfit(loaded)
    if reason:
        raise ModelError(f"model.compile cannot run this model: {reason}. Set model.compile: false")


def _unfit(loaded: LoadedModel) -> str:
    if loaded.base is None or loaded.variants > 1:
        return "it is no single transformer (StaticEmbedding, a Router, or prompts that its pooling leaves out)"
    if loaded.company is not Company.ANY:
        return "its answers change with the texts beside them, and without padding they would, too"
    base = loaded.base.base_model
    config, name = base.config, type(base).__name__
    if loaded.task == "cross_encoder":
        heads = list(loaded.module.model)
        if len(heads) > 1:
            return "its score comes from modules behind the transformer"
        if getattr(config, "is_decoder", False) or not hasattr(loaded.base, "classifier"):
            return f"the head of {type(loaded.base).__name__} looks for a text's last token, which needs padding"
    elif getattr(config, "output_hidden_states", False):
        return "its pooling reads the states of all layers"
    takes = inspect.signature(base.forward).parameters
    layers = set(getattr(config, "layer_types", None) or ("full_attention",))
    windowed = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    able = getattr(base, "_supports_attention_backend", False) and "position_ids" in takes
    if not able or windowed or layers != {"full_attention"}:
        return f"the architecture {name} does not run without padding"
    return ""


def _positions(base: Any) -> Positions:
    embeddings: Any = getattr(base, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        padding = int(embeddings.padding_idx)
        return Positions(padding + 1, padding)
    return Positions()
