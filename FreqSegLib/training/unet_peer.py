"""MONAI's residual UNet as it stands beside our networks.

Reference:
    Kerfoot et al., "Left-Ventricle Quantification Using Residual U-Net", STACOM 2018: MONAI's UNet.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

HEAD_WIDTH = 16


class UNetPeer(nn.Module):
    """The UNet, ending in 16 features, and a 1x1 convolution that draws from them.

    Drawn straight by MONAI's UNet, whose last layers have as many channels as it draws and normalise each of them over
    the picture, the mean of a picture's logits is bound to a place that the weights reach slowly: on 2D lesions nothing
    was drawn after 100 steps, and the loss was twice as high as with the head.

    Args:
        dimensions: 2 or 3.
        in_channels, out_channels: of images and logits.
        widths: channels of its levels, each half as large as the one above.
        residual_units: convolutions of a level's residual unit.
        dropout: share, in [0, 1).
        bias: of the logits at the start.
    """

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        *,
        residual_units: int = 2,
        dropout: float = 0.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        from monai.networks.nets import UNet

        self.body = UNet(
            spatial_dims=dimensions,
            in_channels=in_channels,
            out_channels=HEAD_WIDTH,
            channels=widths,
            strides=(2,) * (len(widths) - 1),
            num_res_units=residual_units,
            norm=("INSTANCE", {"affine": True}),
            dropout=dropout,
        )
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.head = convolution(HEAD_WIDTH, out_channels, 1)
        nn.init.constant_(self.head.bias, bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, *size) -> logits (B, out_channels, *size); sides in whole multiples of 2 ** (levels - 1)."""
        logits: Tensor = self.head(self.body(images))
        return logits
