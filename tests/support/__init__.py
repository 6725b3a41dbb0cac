"""What tests of several rooms share: fakes, builders of images, drivers from the guest's side."""
