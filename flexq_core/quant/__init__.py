"""The number format: symmetric groups of 128, codes of 2 to 8 bits, packing, precision plans.

Pure torch on any device; no files, no network, no models.
"""

from flexq_core.quant.packing import pack_bit_planes, pack_codes, unpack_bit_planes, unpack_codes
from flexq_core.quant.plan import LayerPrecision, PlanError, PrecisionPlan
from flexq_core.quant.quantize import Quantized, dequantize, quantize_groups, quantize_weight
from flexq_core.quant.spec import ACTIVATION_BITS, GROUP_SIZE, WEIGHT_BITS

__all__ = [
    "ACTIVATION_BITS",
    "GROUP_SIZE",
    "WEIGHT_BITS",
    "LayerPrecision",
    "PlanError",
    "PrecisionPlan",
    "Quantized",
    "dequantize",
    "pack_bit_planes",
    "pack_codes",
    "quantize_groups",
    "quantize_weight",
    "unpack_bit_planes",
    "unpack_codes",
]
