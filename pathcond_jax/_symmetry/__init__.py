"""Symmetries: from a program to the neurons whose rescaling provably keeps the outputs."""
