"""Whole models in ONNX: images in, predictions out.

``segmenter.py`` and ``detector.py`` make one function of images of a model, ``onnx_export.py`` exports it, with
``translations.py`` for what PyTorch's exporter does not know. mmvssm's own operators become nodes of the domain
``mmvssm``, each with a function of standard operators (``scan_function.py``, ``functions.py``) that a runtime without
a kernel for the node runs in its place. It needs onnx, onnxscript and, to run a file, onnxruntime
(``requirements/onnx.txt``); nothing here is imported before it is asked for.
"""
