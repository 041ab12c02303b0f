"""Scores of pictures: Fréchet distance, CLIP score, GenEval, DPG-Bench, PSNR and SSIM, and the handwritten digits."""
