"""A small GPT-like model and batches of text, trained with and without steps inside backward."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

BYTES = 256


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return cast("Tensor", x + self.down(functional.gelu(self.up(self.feed_norm(x)))))


class Gpt(nn.Module):
    """A GPT over bytes, the same whenever it is made.

    Args:
        blocks: The number of blocks.
        width: The width of the residual stream.
        length: The largest number of positions.
        tied: Whether embedding and head share their weight.
        reentrant: Whether blocks are checkpointed, and if so in which way.
        shares_block: Whether every block is the same one.
    """

    def __init__(
        self,
        blocks: int = 2,
        width: int = 16,
        length: int = 16,
        *,
        tied: bool = False,
        reentrant: bool | None = None,
        shares_block: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embedding = nn.Embedding(BYTES, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        made = [Block(width, 2) for _ in range(1 if shares_block else blocks)]
        self.blocks = nn.ModuleList(made * blocks if shares_block else made)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return cast("Tensor", self.head(self.norm(x)))

    def loss(self, tokens: Tensor) -> Any:
        """Returns the mean loss of predicting each byte from those before it."""
        return functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batches(text: bytes, count: int, rows: int = 4, length: int = 17) -> list[Tensor]:
    """Returns batches of a text, at places drawn from one seed."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(tokens) - length, (count, rows), generator=generator)
    return [torch.stack([tokens[start : start + length] for start in row.tolist()]) for row in starts]


def equal_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether two float32 models have the same parameters to the last bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    # As integers, NaN is equal to itself.
    return all(torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)) for a, b in pairs)


def trained(model: Any, step: Callable[[], object], data: list[Tensor]) -> list[float]:
    """Trains a model, with a step after each backward pass, and returns the losses."""
    losses = []
    for tokens in data:
        loss = model.loss(tokens)
        loss.backward()
        step()
        losses.append(loss.item())
    return losses
