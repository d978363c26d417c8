"""What leaves a run: artefact, card, answers."""
