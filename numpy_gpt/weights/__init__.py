"""Reading and writing weights: the file formats, and the model's parameter dict."""
