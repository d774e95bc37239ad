"""Mean and standard deviation of the colors in ImageNet: red, green and blue, from 0 to 1.

The input of every network is normalized by them: (pixel / 255 - MEAN) / STDDEV.
"""

MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)
