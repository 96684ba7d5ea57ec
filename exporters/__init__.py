"""Student directory -> artifact directory of a runtime. Importing this imports no runtime."""

from bitdistill.exporters.base import EXPORTERS, Options, Progress, bits_per_weight, export

__all__ = ["EXPORTERS", "Options", "Progress", "bits_per_weight", "export"]
