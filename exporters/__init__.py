"""Student directory -> artifact directory of a runtime. Importing this imports no runtime."""

from bitdistill.exporters.base import EXPORTERS, Options, Progress, export

__all__ = ["EXPORTERS", "Options", "Progress", "export"]
