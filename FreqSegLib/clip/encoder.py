"""What the saliency stage asks of an image-text encoder: an image tower that can be cut after any block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from FreqSegLib.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@runtime_checkable
class ImageTextEncoder(Protocol):
    """A frozen vision transformer and a text tower in one embedding space.

    An information bottleneck sits between ``prefix`` and ``suffix``: the prefix runs once an image, the suffix many
    times. Layers are counted from 1, so ``layer_idx=9`` means after 9 of 12 blocks.

    Attributes:
        image_size: side S of the square input in pixels.
        token_grid: ``(rows, columns)`` of image tokens.
        width: channels of a token.
        num_layers: blocks of the image tower.
        embed_dim: size of the shared embedding.
        num_prefix_tokens: tokens in front of the image tokens that stand for no place (class tokens).
    """

    @property
    def image_size(self) -> int: ...

    @property
    def token_grid(self) -> tuple[int, int]: ...

    @property
    def width(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def embed_dim(self) -> int: ...

    @property
    def num_prefix_tokens(self) -> int: ...

    def prefix(self, images: Tensor, layer_idx: int) -> Tensor:
        """Tokens ``(B, N, width)`` after block ``layer_idx``, of ``images (B, 3, S, S)`` in [0, 1].

        The encoder applies its own mean and standard deviation.
        """
        ...

    def suffix(self, tokens: Tensor, layer_idx: int) -> Tensor:
        """Unit image embeddings ``(B, embed_dim)`` of the tokens ``prefix`` gave for the same ``layer_idx``."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit image embeddings ``(B, embed_dim)`` of ``images (B, 3, S, S)`` in [0, 1]."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings ``(P, embed_dim)``; a prompt longer than the text tower reads is cut, with a warning."""
        ...

    def features(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Maps ``(B, width, rows, columns)`` after each block in ``layers``, in the order asked, from one pass."""
        ...


def token_maps(tokens: Tensor, token_grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Tokens ``(B, N, width)`` as maps ``(B, width, rows, columns)``, class tokens dropped."""
    places = tokens[:, num_prefix_tokens:]
    return places.transpose(1, 2).unflatten(2, token_grid)


def check_layer(layer_idx: int, num_layers: int) -> None:
    """Refuse a layer the image tower does not have.

    Raises:
        SettingsError: ``layer_idx`` is not in 1..num_layers.
    """
    if not 1 <= layer_idx <= num_layers:
        raise SettingsError(f"layer_idx must be in 1..{num_layers} for this image encoder, got {layer_idx}.")
