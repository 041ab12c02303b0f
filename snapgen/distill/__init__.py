"""Distillation: objectives and tasks for the loop in `snapgen.train`."""
