"""Records: samples as rows of bytes, and where these lie."""
