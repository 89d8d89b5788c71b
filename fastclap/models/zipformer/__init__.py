"""SPEAR's Zipformer, the audio tower of CLSP."""
