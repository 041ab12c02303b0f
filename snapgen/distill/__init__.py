"""Distillation: a student that learns from a teacher of another architecture, and then to draw in a few steps."""
