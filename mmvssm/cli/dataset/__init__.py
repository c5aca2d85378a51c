"""Data sets handed to the tools: pointing a config at one, and checking it before anything is trained on it.

``root`` makes a config use a folder, ``check`` looks at all that the run will read: ``annotations`` at files in
COCO's format, ``label_maps`` at semantic maps, ``pictures`` at what images say about themselves.
"""
