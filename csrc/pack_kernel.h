// Packing of weights and plain products out = a B. Included once per instruction set (see simd.h).

template <class T>
void pack_blocks(const Pack& p, int64_t begin, int64_t end) {
  using P = Panel<T>;
  const int64_t first = begin * kColumns, last = end * kColumns < p.columns ? end * kColumns : p.columns;
  pack_b<P, T>(static_cast<const T*>(p.source) + first * p.stride_n, p.stride_k, p.stride_n, p.depth, last - first,
               static_cast<P*>(p.out) + begin * block_stride<P>(p.depth));
}

template <class T>
int64_t pack_elements(int64_t depth, int64_t columns) {
  return packed_elements<Panel<T>>(depth, columns);
}

constexpr int64_t kProductBlocks = 4;  // column blocks of a C buffer

// Bytes of a task's panel of A, rounded up to a cache line, and its C buffer.
template <class T>
int64_t product_panel_bytes(const Product& p) {
  const int64_t depth = p.slice ? p.slice : p.depth;
  return (p.tile_rows * padded<Panel<T>>(depth) * int64_t(sizeof(Panel<T>)) + 63) / 64 * 64;
}
template <class T>
int64_t product_scratch(const Product& p) {
  return product_panel_bytes<T>(p) + p.tile_rows * (p.slice ? p.group_columns : kProductBlocks * kColumns) * 4;
}

template <class T>
SG_INLINE void store_rows(const float* c, int64_t ldc, int64_t rows, int64_t columns, T* out, int64_t ldo) {
  for (int64_t m = 0; m < rows; ++m) {
    int64_t n = 0;
    for (; n + kLanes <= columns; n += kLanes) store<kLanes>(out + m * ldo + n, load<kLanes>(c + m * ldc + n));
    for (; n < columns; ++n) store<1>(out + m * ldo + n, load<1>(c + m * ldc + n));
  }
}

template <class T>
void deep_product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  P* panel = static_cast<P*>(scratch);
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + product_panel_bytes<T>(p));
  const int64_t groups = (p.columns + p.group_columns - 1) / p.group_columns, ldc = p.group_columns;
  const bool in_place = sizeof(P) == sizeof(T) && p.stride_k == 1 && p.depth % kDepth<P> == 0;
  const int64_t stride = block_stride<P>(p.depth);
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task / groups * p.tile_rows, n0 = task % groups * p.group_columns;
    const int64_t rows = p.rows - first < p.tile_rows ? p.rows - first : p.tile_rows;
    const int64_t columns = p.columns - n0 < p.group_columns ? p.columns - n0 : p.group_columns;
    const T* a = static_cast<const T*>(p.a) + first * p.stride_m;
    const P* b = static_cast<const P*>(p.b) + n0 / kColumns * stride;
    for (int64_t k = 0; k < p.depth; k += p.slice) {
      const int64_t depth = p.depth - k < p.slice ? p.depth - k : p.slice;
      const P* rows_of_a = panel;
      int64_t lda = padded<P>(p.slice);
      if (in_place) rows_of_a = reinterpret_cast<const P*>(a + k), lda = p.stride_m;
      else pack_a<P, T>(a + k * p.stride_k, p.stride_m, p.stride_k, rows, depth, panel, lda);
      // One block at a time: the distance between blocks is that of the whole depth.
      for (int64_t j = 0; j < blocks_of(columns); ++j)
        gemm<P>(rows, 1, depth, rows_of_a, lda, b + j * stride + k * kColumns, c + j * kColumns, ldc, k > 0);
    }
    store_rows<T>(c, ldc, rows, columns, static_cast<T*>(p.out) + first * p.columns + n0, p.columns);
  }
  tiles_end();
}

template <class T>
void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.slice) return deep_product<T>(p, begin, end, scratch);
  using P = Panel<T>;
  P* panel = static_cast<P*>(scratch);
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + product_panel_bytes<T>(p));
  const int64_t blocks = blocks_of(p.columns), ldc = kProductBlocks * kColumns;
  const bool in_place = sizeof(P) == sizeof(T) && p.stride_k == 1 && p.depth % kDepth<P> == 0;
  const T* a = static_cast<const T*>(p.a);
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * p.tile_rows, rows = p.rows - first < p.tile_rows ? p.rows - first : p.tile_rows;
    const P* rows_of_a = panel;
    int64_t lda = padded<P>(p.depth);
    if (in_place) rows_of_a = reinterpret_cast<const P*>(a + first * p.stride_m), lda = p.stride_m;
    else pack_a<P, T>(a + first * p.stride_m, p.stride_m, p.stride_k, rows, p.depth, panel, lda);
    T* out = static_cast<T*>(p.out) + first * p.columns;
    for (int64_t j = 0; j < blocks; j += kProductBlocks) {
      const int64_t some = blocks - j < kProductBlocks ? blocks - j : kProductBlocks;
      gemm<P>(rows, some, p.depth, rows_of_a, lda, static_cast<const P*>(p.b) + j * block_stride<P>(p.depth), c, ldc, false);
      const int64_t n0 = j * kColumns, wide_n = p.columns - n0 < some * kColumns ? p.columns - n0 : some * kColumns;
      store_rows<T>(c, ldc, rows, wide_n, out + n0, p.columns);
    }
  }
  tiles_end();
}

constexpr PackTable pack_table() {
  return {sizeof(Panel<bf16>) == 2, pack_elements<float>,   pack_elements<bf16>, kColumns,       pack_blocks<float>,
          pack_blocks<bf16>,        product_scratch<float>, product_scratch<bf16>, product<float>, product<bf16>};
}
