"""From captions to training data: filters that say what they dropped, best of several, licences, exporters."""
