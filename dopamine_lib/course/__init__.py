"""What surrounds the chapters: homework, the pictures of the gallery, the static site."""
