"""The mean color of ImageNet and its standard deviation (R, G, B from 0 to 1).

Inputs of every network are normalized by them: (pixel / 255 - MEAN) / STDDEV.
"""

MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)
