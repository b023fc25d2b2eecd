"""How the low- and the high-frequency stream speak to each other, and how their saliencies become one.

Everything here is the identity until it is trained: gates and output projections start at zero.
"""

from FreqSegLib.interaction.adaptive_fusion import METHODS, AdaptiveFusion, compare_fusion
from FreqSegLib.interaction.ffbi import FFBI, EfficientFFBI, SaliencyInteraction

__all__ = ["FFBI", "METHODS", "AdaptiveFusion", "EfficientFFBI", "SaliencyInteraction", "compare_fusion"]
