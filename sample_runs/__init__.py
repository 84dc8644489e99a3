"""Recorded runs to open at once, and the training code that remakes each.

``adamw.h5``, ``muon.h5`` and ``normuon.h5`` beside this file are three trainings of one small
GPT on the same batches. ``normuon-lens demo`` makes such runs anew.
"""
