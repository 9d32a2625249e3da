"""Do experts cause what a model does: answers under interventions, and their scores."""
