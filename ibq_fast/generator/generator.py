"""The class-conditional autoregressive transformer over the tokens of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibq_fast.checkpoint.pretrained import PretrainedMixin, build_and_load
from ibq_fast.generator import arguments
from ibq_fast.generator.config import GeneratorConfig
from ibq_fast.generator.decoder import Decoder, precision_of
from ibq_fast.generator.guidance import Guidance
from ibq_fast.generator.rotary import RotaryTable
from ibq_fast.generator.sampler import Partial, Request, generate, rows_needed
from ibq_fast.generator.settings import SamplingSettings
from ibq_fast.generator.transformer import Block, HeadNorm
from ibq_fast.ops import linear_cross_entropy


class TokenProjection(nn.Module):
    """Two-layer map from a token embedding of its own size to the width of the model."""

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(token_dim, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., token_dim] -> [..., width]."""
        return self.out(F.gelu(self.expand(x), approximate="tanh"))


class Generator(PretrainedMixin, nn.Module):
    """Predicts an image's tokens in raster order from its class and the tokens before.

    The sequence is the class embedding followed by the token embeddings; the output at position i predicts
    token i. ``from_pretrained`` reads own directories and the published stage-two checkpoints; for the
    latter ``num_heads=`` and ``grid=`` say what tensor shapes cannot (defaults: width / 64, and 16 x 16).
    """

    config_class: ClassVar[type] = GeneratorConfig
    recompute = False
    """Whether training recomputes each block's activations in the backward pass instead of keeping them."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, config.token_dim or width)
        self.token_projection = (
            TokenProjection(config.token_dim, width) if config.token_dim else nn.Identity()
        )
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.rotary = RotaryTable(config.grid, config.head_dim, config.rope_base)
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_norm = HeadNorm(config)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self._decoder: tuple[tuple[Any, ...], Decoder] | None = None
        self.reset_parameters()

    @property
    def null_class(self) -> int:
        """The class id that stands for "no class"."""
        return self.config.num_classes

    def forward(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Logits of every next token.

        ``tokens`` int [B, L] with 0 <= L < rows * columns: the first L tokens of each image; ``class_ids``
        int [B], ``num_classes`` being the null class. Returns [B, L + 1, vocab_size]; position i predicts
        token i. While training, each class becomes the null class with probability ``class_dropout``.

        Raises ``ValueError`` for wrong shapes, dtypes, lengths and values out of range (values of tensors on
        an accelerator are checked in eval mode only: looking at them would stall every training step).
        """
        return self.head(self._hidden(tokens, class_ids))

    def loss(self, tokens: Tensor, class_ids: Tensor, *, inputs: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats of all tokens of whole images: a scalar.

        ``tokens`` int [B, rows * columns] (or [B, rows, columns]), ``class_ids`` int [B]. ``inputs`` int
        [B, rows * columns - 1] replaces the tokens that the model sees (default: ``tokens`` without the
        last), for training on corrupted context; while training, ``pkeep`` below 1 corrupts the default.

        The logits are never in memory: see :func:`ibq_fast.ops.linear_cross_entropy`. Under autocast hidden
        vectors and head are multiplied in its dtype, like any linear layer.
        """
        tokens = arguments.whole_images(tokens, self.config)
        hidden = self._hidden(self._context(tokens) if inputs is None else inputs, class_ids).flatten(0, 1)
        device_type = hidden.device.type
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.head.weight.dtype
        return linear_cross_entropy(hidden.to(dtype), self.head.weight.to(dtype), tokens.flatten().long())

    def sample(
        self,
        class_ids: Tensor | Sequence[int],
        cfg_scale: float | Guidance | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        first_image: int = 0,
        precision: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw images: tokens int64 [B, rows, columns], one image per entry of ``class_ids`` [B].

        ``cfg_scale`` s > 1 guides: logits u + s (c - u) of the class's c and the null class's u; None or
        s <= 1 samples the class's logits alone, at half the cost; a :class:`Guidance` has a scale for each
        position. ``temperature`` > 0 divides logits; ``top_k`` keeps the k largest (0: all, 1: greedy), then
        ``top_p`` in (0, 1] keeps the smallest set of that probability. ``precision`` of the weights while
        decoding: "float32", "bf16", "int8" (one scale per output channel), None for the model's.

        Row i is image ``first_image + i`` of the run ``seed``. Its random numbers depend on those two, the
        position and the code alone, so a run may be cut into calls anywhere and gives the same images. On the
        CPU that holds bit for bit: the native kernels give a row the same bits in any batch. The composite
        backend rests on a library's products, whose last bits may depend on the number of rows: there a draw
        closer than float rounding may come out differently.

        ``progress(done, total)`` is called after every position. Works in training mode too, always without
        dropout. The decoder with its key-value cache is kept for the next call; ``train()`` frees it.
        """
        if progress is not None and not callable(progress):
            raise ValueError(f"progress: expected a callable (done, total), got {progress!r}")
        tokens = torch.empty(0, *self.config.grid, dtype=torch.int64, device=self.head.weight.device)
        for part in self.generate(
            class_ids,
            cfg_scale,
            temperature,
            top_k,
            top_p,
            seed,
            first_image=first_image,
            precision=precision,
        ):
            tokens = part.tokens
            if progress is not None:
                progress(part.done, part.total)
        return tokens

    def generate(
        self,
        class_ids: Tensor | Sequence[int],
        cfg_scale: float | Guidance | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        first_image: int = 0,
        precision: str | None = None,
    ) -> Iterator[Partial]:
        """As :meth:`sample`, with what is drawn so far after every position: ``done`` of ``total`` positions
        and ``tokens`` int64 [B, rows, columns], -1 where none is drawn yet. Nothing without images.

        Arguments are checked at once. Several of these may be under way at a time; each has a decoder of its
        own, which is given back when it ends or is closed.
        """
        ids = arguments.sampled_classes(class_ids, self.config, torch.device("cpu")).tolist()
        guidance = Guidance(cfg_scale) if isinstance(cfg_scale, (int, float)) else cfg_scale
        settings = SamplingSettings(guidance, temperature, top_k, top_p)
        arguments.check_numbers(seed=seed, first_image=first_image)
        precision_of(self, precision)
        requests = [Request(ids[i], settings, seed, first_image + i) for i in range(len(ids))]
        return self.draw(requests, precision)

    @torch.no_grad()
    def draw(self, requests: Sequence[Request], precision: str | None = None) -> Iterator[Partial]:
        """As :meth:`generate` for requests that may differ in everything, together in one batch; they are not
        checked."""
        if requests:
            rows = sum(rows_needed(request.settings, self.config.num_tokens) for request in requests)
            with self._lent_decoder(rows, precision) as decoder:
                yield from generate(decoder, requests)

    @torch.no_grad()
    def set_input_codes(self, codes: Tensor, *, frozen: bool = False) -> None:
        """Embed tokens by ``codes`` [vocab_size, token_dim], a tokenizer's codebook; ``frozen``: for good.

        Raises ValueError for another shape, which a model without ``token_dim`` expects too.
        """
        expected = [self.config.vocab_size, self.config.token_dim]
        if list(codes.shape) != expected:
            raise ValueError(
                f"codes: expected [vocab_size, token_dim] = {expected} as in the config, "
                f"got {list(codes.shape)}"
            )
        self.token_embedding.weight.copy_(codes)
        self.token_embedding.weight.requires_grad_(not frozen)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token indices [...] -> input vectors [..., width]."""
        return self.token_projection(self.token_embedding(tokens))

    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def condition(self, class_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Class embeddings [B, width] -> what the blocks and what the head norm are modulated by."""
        activated = F.silu(class_vectors)
        return (self.shared_adaln(activated) if self.config.shared_adaln else activated), activated

    def decoder(self, rows: int, precision: str | None = None) -> Decoder:
        """A decoder for at least ``rows`` sequences, made once and kept while it is large enough and the
        weights are the ones that it was made from. ``precision``: "float32", "bf16", "int8", ...; None is
        the model's."""
        precision = precision_of(self, precision)
        weights = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in self.parameters())
        key = (precision, weights)
        if self._decoder is None or self._decoder[0] != key or self._decoder[1].rows < rows:
            self._decoder = None
            self._decoder = key, Decoder(self, rows, precision=precision)
        return self._decoder[1]

    @contextmanager
    def _lent_decoder(self, rows: int, precision: str | None) -> Iterator[Decoder]:
        """:meth:`decoder`, out of reach of others until it is given back."""
        self.decoder(rows, precision)
        lent, self._decoder = self._decoder, None
        assert lent is not None
        try:
            yield lent[1]
        finally:
            self._decoder = None if self.training else lent

    def train(self, mode: bool = True) -> Generator:
        """As ``nn.Module.train``; entering training mode frees the decoder."""
        if mode:
            self._decoder = None
        super().train(mode)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights: N(0, init_std^2), class projections scaled down, gates near 0, head 0."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for block in self.layers():
            block.reset_modulation(self.config)
        self.head_norm.adaln.weight *= 0.5
        self.head.weight.zero_()

    def _context(self, tokens: Tensor) -> Tensor:
        """What the model sees of whole images [B, L]: all but the last token, some replaced in training."""
        context = tokens[:, :-1]
        if not self.training or self.config.pkeep == 1:
            return context
        kept = torch.rand(context.shape, device=context.device) < self.config.pkeep
        return torch.where(kept, context, torch.randint_like(context, self.config.vocab_size))

    def _hidden(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Normalised output of the last block [B, L + 1, width], before the head; checks the arguments."""
        arguments.check_classes(class_ids, self.config, look=class_ids.is_cpu or not self.training)
        arguments.check_tokens(tokens, class_ids, self.config, look=tokens.is_cpu or not self.training)
        if self.training and self.config.class_dropout > 0:
            dropped = torch.rand(class_ids.shape, device=class_ids.device) < self.config.class_dropout
            class_ids = class_ids.masked_fill(dropped, self.null_class)
        class_vectors = self.class_embedding(class_ids)
        x = torch.cat((class_vectors.unsqueeze(1), self.embed_tokens(tokens)), dim=1)
        x = F.dropout(x, self.config.token_dropout, self.training)
        block_condition, head_condition = self.condition(class_vectors)
        factors = self.rotary(0, x.shape[1])
        for block in self.layers():
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, block_condition, factors, use_reentrant=False)
            else:
                x = block(x, block_condition, factors)
        return self.head_norm(x, head_condition)

    @classmethod
    def _from_reference(
        cls,
        path: Path,
        state_dict: dict[str, Tensor],
        *,
        ema: bool,
        num_heads: int | None = None,
        grid: int | tuple[int, int] | None = None,
        **unknown: Any,
    ) -> Generator:
        """``ema`` is accepted and changes nothing: the published stage two keeps no averaged weights."""
        from ibq_fast.checkpoint.reference_generator import from_reference_layout, infer_config

        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: expected num_heads or grid")

        transformer = from_reference_layout(state_dict, path)
        config = infer_config(transformer, path, num_heads=num_heads, grid=grid)
        return build_and_load(cls, config, transformer, path)
