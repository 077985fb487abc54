// Runs a target without a fuzzing compiler: every file that is named, then random inputs for some seconds.
//   fuzz_keys [--seconds N] [--seed N] [--last FILE] [FILE or FOLDER ...]
// The input that is being run lies in the file of --last, so that a crash leaves it behind; give it as a FILE to repeat.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "bytes.h"

namespace {

using Input = std::vector<uint8_t>;
constexpr size_t kMaxInput = 512;
constexpr unsigned kSlowestSeconds = 20;  // for one input

// A mapped file outlives a crash; writing it costs no system call.
class Last {
 public:
  explicit Last(const std::string& path) : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0644)) {
    MUST(fd_ >= 0 && ftruncate(fd_, kMaxInput) == 0);
    memory_ = static_cast<uint8_t*>(mmap(nullptr, kMaxInput, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0));
    MUST(memory_ != MAP_FAILED);
  }
  void keep(const Input& input) {  // zeros behind it: what a target reads behind an input's end
    std::memset(memory_, 0, kMaxInput);
    if (!input.empty()) std::memcpy(memory_, input.data(), std::min(input.size(), kMaxInput));
  }

 private:
  int fd_;
  uint8_t* memory_;
};

struct Options {
  double seconds = 0;
  uint64_t seed = std::random_device()();
  std::string last = "fuzz.last";
  std::vector<std::string> paths;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      options.paths.push_back(word);
      continue;
    }
    MUST(i + 1 < argc);
    const std::string value = argv[++i];
    if (word == "--seconds") options.seconds = std::stod(value);
    else if (word == "--seed") options.seed = std::stoull(value);
    else if (word == "--last") options.last = value;
    else MUST(!"an option that is known");
  }
  return options;
}

Input read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  MUST(file);
  return Input(std::istreambuf_iterator<char>(file), {});
}

std::vector<Input> read_all(const std::vector<std::string>& paths) {
  std::vector<Input> inputs;
  for (const std::string& path : paths) {
    if (!std::filesystem::is_directory(path)) inputs.push_back(read_file(path));
    else
      for (const auto& entry : std::filesystem::directory_iterator(path)) inputs.push_back(read_file(entry.path()));
  }
  return inputs;
}

// Half of the inputs are new, half are known ones with some bytes changed. Small and extreme numbers are the likely ones.
Input random_input(const std::vector<Input>& known, std::mt19937_64& random) {
  const auto below = [&](size_t limit) { return size_t(random() % limit); };
  const auto byte = [&] {
    constexpr uint8_t kOften[] = {0, 1, 2, 4, 0x7f, 0x80, 0xff};
    return below(2) ? kOften[below(sizeof kOften)] : uint8_t(random());
  };
  Input input;
  if (!known.empty() && below(2)) input = known[below(known.size())];
  else input.assign(below(kMaxInput), 0), std::generate(input.begin(), input.end(), byte);
  for (size_t i = below(8); i > 0 && !input.empty(); i--) input[below(input.size())] = byte();
  if (below(4) == 0) input.resize(below(kMaxInput));
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const std::vector<Input> known = read_all(options.paths);
  Last last(options.last);
  size_t num_inputs = 0;
  const auto run = [&](const Input& input) {
    last.keep(input);
    alarm(kSlowestSeconds);
    LLVMFuzzerTestOneInput(input.data(), input.size());
    num_inputs++;
  };
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed)), std::fflush(stdout);
  for (const Input& input : known) run(input);
  std::mt19937_64 random(options.seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(options.seconds);
  while (std::chrono::steady_clock::now() < end) run(random_input(known, random));
  unlink(options.last.c_str());
  std::printf("%zu inputs, %zu of them from files: nothing found\n", num_inputs, known.size());
}
