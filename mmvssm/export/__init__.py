"""Export whole models to ONNX: images in, predictions out.

``segmenter.py`` and ``detector.py`` wrap a model as one function of images. ``onnx_export.py`` exports it;
``translations.py`` has the operators that PyTorch's exporter lacks. mmvssm's own operators become nodes of the domain
``mmvssm``, each with a function of standard operators (``scan_function.py``, ``functions.py``) for runtimes without a
kernel for the node. This folder needs onnx, onnxscript and, to run a file, onnxruntime (``requirements/onnx.txt``);
import its modules only when you use them.
"""
