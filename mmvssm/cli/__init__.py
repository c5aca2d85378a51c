"""The command line: what tools/train.py and tools/test.py do around mmengine's runner. Nothing imports it but tools."""
