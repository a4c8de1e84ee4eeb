"""Images with annotations."""
from torchvision import tv_tensors
class SemanticMask(tv_tensors.Mask):
    pass
