"""Pre-training on mmpretrain: what this package adds to its classifiers.

Unlike the rest of mmvssm this needs mmpretrain, and ``import mmvssm`` leaves it alone: configs name it beside,
``custom_imports = dict(imports=['mmvssm', 'mmvssm.pretraining'])``.
"""

from .distillation import DistillationHead, DistilledClassifier

__all__ = ["DistillationHead", "DistilledClassifier"]
