"""Training of object detectors: data with boxes, networks, the loop, COCO's mean average precision."""
